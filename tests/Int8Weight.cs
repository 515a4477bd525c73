using System.Numerics;
using System.Runtime.InteropServices;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Tests;

/// <summary>
/// A second kind of weight, to prove that one needs no edit in any operation: W[r, c] = scale[r] *
/// q[r, c] with q in int8, unpacked whole into scratch whenever it is multiplied by. Scales are
/// powers of two, so that every storage type holds W exactly.
/// </summary>
internal sealed unsafe class Int8Weight : Weight
{
    /// <summary>kernels.cu with the kernel that unpacks.</summary>
    public static string Source { get; } = CudaKernels.Source + """

        extern "C" __global__ void __launch_bounds__(256) unpack_test(
            real* y, const signed char* x, const float* scales, int cols, long long count)
        {
            long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
            if (i < count) y[i] = narrow(x[i] * scales[i / cols]);
        }

        """;

    private readonly Tensor _elements, _scales;

    public Int8Weight(Device device, int outputs, int inputs, int seed)
        : this(device, inputs,
            [.. Fill.Below(seed, outputs * inputs, 255).Select(v => (sbyte)(v - 127))],
            [.. Enumerable.Range(0, outputs).Select(r => MathF.Pow(2, (r % 5) - 8))])
    {
    }

    /// <summary>
    /// The nearest such weight: each row by the least power of two that its largest magnitude fits.
    /// </summary>
    public static Int8Weight Nearest(Device device, int inputs, ReadOnlySpan<float> values)
    {
        var elements = new sbyte[values.Length];
        var scales = new float[values.Length / inputs];
        for (int r = 0; r < scales.Length; r++)
        {
            float largest = 0;
            foreach (float v in values.Slice(r * inputs, inputs))
                largest = Math.Max(largest, Math.Abs(v));
            scales[r] = largest == 0 ? 1 : MathF.Pow(2, MathF.Ceiling(MathF.Log2(largest / 127)));
            for (int i = r * inputs; i < (r + 1) * inputs; i++)
                elements[i] = (sbyte)MathF.Round(values[i] / scales[r]);
        }

        return new Int8Weight(device, inputs, elements, scales);
    }

    private Int8Weight(Device device, int inputs, sbyte[] elements, float[] scales)
    {
        (Outputs, Inputs) = (scales.Length, inputs);
        Dequantised = new double[elements.Length];
        for (int i = 0; i < elements.Length; i++)
            Dequantised[i] = elements[i] * (double)scales[i / inputs];
        _elements = device.Allocate(new Spec(DType.U8, new Shape(Outputs, inputs)), "int8");
        _scales = device.Allocate(new Spec(DType.F32, new Shape(Outputs)), "scales");
        device.Write<byte>(_elements, MemoryMarshal.AsBytes<sbyte>(elements));
        device.Write<float>(_scales, scales);
    }

    public override int Outputs { get; }

    public override int Inputs { get; }

    public override long Bytes => _elements.Spec.Bytes + _scales.Spec.Bytes;

    /// <summary>W[outputs, inputs].</summary>
    public double[] Dequantised { get; }

    /// <summary>Products so far.</summary>
    public int Products { get; private set; }

    public override void Multiply<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y, double alpha,
        double beta, Matrix<T> bias) =>
        call.Gemm.Multiply(x.View, Unpacked(call).View.T, y.View, alpha, beta, bias.Data);

    public override void MultiplyTransposed<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y,
        double alpha, double beta, Matrix<T> bias) =>
        call.Gemm.Multiply(x.View, Unpacked(call).View, y.View, alpha, beta, bias.Data);

    public override void Multiply(in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha,
        double beta) =>
        call.Multiply(x, ((CudaMatrix)Unpacked(call)).T, y, alpha, beta);

    public override void MultiplyTransposed(in CudaCall call, CudaMatrix x, CudaMatrix y,
        double alpha, double beta) =>
        call.Multiply(x, Unpacked(call), y, alpha, beta);

    private Matrix<T> Unpacked<T>(in CpuCall<T> call)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Products++;
        Matrix<T> w = call.Scratch(new Shape(Outputs, Inputs));
        var elements = (sbyte*)_elements.Data;
        var scales = (float*)_scales.Data;
        bool wide = typeof(T) == typeof(double);
        for (long i = 0; i < w.Count; i++)
        {
            float value = elements[i] * scales[i / Inputs];
            if (wide) ((double*)w.Data)[i] = value;
            else ((float*)w.Data)[i] = value;
        }

        return w;
    }

    private Tensor Unpacked(in CudaCall call)
    {
        Products++;
        Tensor w = call.Scratch(call.Real, Outputs, Inputs);
        long count = w.Shape.Count;
        call.Launch("unpack_test", Grid.Elements(count), w, _elements, _scales, Inputs, count);
        return w;
    }
}
