using System.Buffers;

namespace MiniCpmNative.Kernels;

/// <summary>
/// Floats in and out of device tensors of any float type; for loading and saving.
/// </summary>
public static class DeviceFloats
{
    /// <summary>
    /// Copies values in, rounded to nearest even where the tensor's type is narrower.
    /// </summary>
    public static unsafe void WriteFloats(this Device device, in Tensor tensor,
        ReadOnlySpan<float> values)
    {
        if (tensor.Type == DType.F32)
        {
            device.Write(tensor, values);
        }
        else if (tensor.Type == DType.F64)
        {
            device.Write<double>(tensor, Array.ConvertAll(values.ToArray(), v => (double)v));
        }
        else
        {
            var narrow = new ushort[values.Length];
            fixed (float* from = values)
            fixed (ushort* to = narrow) FloatBits.Narrow(from, to, tensor.Type, values.Length);
            device.Write<ushort>(tensor, narrow);
        }
    }

    /// <summary>Copies values out as floats.</summary>
    public static float[] ReadFloats(this Device device, in Tensor tensor)
    {
        var values = new float[checked((int)tensor.Shape.Count)];
        device.ReadFloats(tensor, values);
        return values;
    }

    /// <summary>Copies values out as floats, all of them.</summary>
    public static unsafe void ReadFloats(
        this Device device, in Tensor tensor, Span<float> values)
    {
        if (tensor.Type == DType.F32)
        {
            device.Read(tensor, values);
        }
        else if (tensor.Type == DType.F64)
        {
            var wide = new double[values.Length];
            device.Read<double>(tensor, wide);
            for (int i = 0; i < wide.Length; i++) values[i] = (float)wide[i];
        }
        else
        {
            var narrow = ArrayPool<ushort>.Shared.Rent(values.Length);
            device.Read<ushort>(tensor, narrow.AsSpan(0, values.Length));
            fixed (ushort* from = narrow)
            fixed (float* to = values) FloatBits.Widen(from, tensor.Type, to, values.Length);
            ArrayPool<ushort>.Shared.Return(narrow);
        }
    }
}
