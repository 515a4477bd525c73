using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// Random numbers for tensors of a device: zeros would take less power, and so less time.
/// </summary>
internal static unsafe class DeviceNoise
{
    private const int Count = 1 << 22;

    private static readonly float[] s_values = Values();

    /// <summary>Numbers of deviation 1, over and over.</summary>
    public static void Fill(CudaDevice device, params ReadOnlySpan<Tensor> tensors)
    {
        foreach (ref readonly Tensor tensor in tensors)
        {
            var bytes = new byte[(long)Count * tensor.Type.Size()];
            fixed (float* from = s_values)
            fixed (byte* to = bytes)
            {
                FloatBits.Narrow(from, to, tensor.Type, Count);
                for (long done = 0; done < tensor.Spec.Bytes; done += bytes.Length)
                {
                    int piece = (int)Math.Min(bytes.Length, tensor.Spec.Bytes - done);
                    device.Upload(
                        new Tensor(tensor.Data + (nint)done,
                            new Spec(DType.U8, new Shape(piece))), to);
                }
            }
        }
    }

    private static float[] Values()
    {
        var random = new Random(3);
        var values = new float[Count];
        for (int i = 0; i < Count; i++)
            values[i] = (float)(Math.Sqrt(-2 * Math.Log(1 - random.NextDouble()))
                * Math.Cos(2 * Math.PI * random.NextDouble()));
        return values;
    }
}
