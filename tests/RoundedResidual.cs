using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using static MiniCpmNative.Tests.RoundedLora;

namespace MiniCpmNative.Tests;

/// <summary>
/// <see cref="ResidualLinear"/> with an adapter that rounds to a storage type what a GPU stores in it
/// on the way: what <see cref="RoundedLora"/> rounds, f(x) and its gradient, the layer's result and
/// the scaled gradient. Loops in double.
/// </summary>
internal sealed record RoundedResidual(ResidualLinear Inner, DType Storage) : Op("residual_linear")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations) =>
        Inner.Infer(inputs, activations);

    public override bool Differentiates(int input) => Inner.Differentiates(input);

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Inner.CpuForward(call);
        int rows = call.Output.Rows, cols = call.Output.Cols;
        double[] x = Input(Doubles(call.In(0))), residual = Doubles(call.In(5));
        double[] bias = call.In(2).Exists ? Doubles(call.In(2)) : new double[cols];
        double[] own = Rounded(
            [.. Product(Low(call, x), Transposed(call.In(4)), rows, cols)
                .Select((v, at) => (v * Inner.Scale) + bias[at % cols])]);
        own = Rounded([.. own.Zip(
            Added(Product(x, Transposed(call.In(1)), rows, cols)), (p, q) => p + q)]);
        Write(call.Output, [.. residual.Zip(own, (r, v) => r + (Inner.Factor * v))]);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Inner.CpuBackward(call);
        int rows = call.Output.Rows, cols = call.Output.Cols, rank = call.In(3).Rows;
        int inputs = call.In(3).Cols;
        double[] stored = Doubles(call.In(0)), x = Input(stored);
        double[] dy = Rounded([.. Doubles(call.OutputGradient).Select(v => Inner.Factor * v)]);
        double[] turned = Transposed(dy, rows, cols), mask = Mask(call, rows, inputs);
        double[] t = Rounded(
            [.. Product(dy, Doubles(call.In(4)), rows, rank).Select(v => Inner.Scale * v)]);
        Put(call.Gradient(1), Product(turned, x, cols, inputs));
        Put(call.Gradient(2), Product([.. Enumerable.Repeat(1.0, rows)], dy, 1, cols));
        Put(call.Gradient(3), Product(
            Transposed(t, rows, rank), [.. x.Zip(mask, (v, m) => v * m)], rank, inputs));
        Put(call.Gradient(4), [.. Product(turned, Low(call, x), cols, rank)
            .Select(v => Inner.Scale * v)]);
        double[] adapter = [.. Product(t, Doubles(call.In(3)), rows, inputs)
            .Zip(mask, (v, m) => v * m)];
        double[] dx = [.. Rounded(adapter).Zip(
            Added(Product(dy, Doubles(call.In(1)), rows, inputs)), (p, q) => p + q)];
        if (Inner.Gated)
        {
            double[] gate = stored[..(rows * inputs)], up = stored[(rows * inputs)..];
            dx = Rounded(dx);
            dx =
            [
                .. dx.Select((v, i) => v * up[i] * Slope(gate[i])),
                .. dx.Select((v, i) => v * gate[i] * Sigmoid(gate[i])),
            ];
        }

        Put(call.Gradient(0), dx);
    }

    public override void CudaForward(in CudaCall call) => Inner.CudaForward(call);

    public override void CudaBackward(in CudaCall call) => Inner.CudaBackward(call);

    private static double Sigmoid(double x) => 1 / (1 + Math.Exp(-x));

    private static double Slope(double x) =>
        Sigmoid(x) * (1 + (x * (1 - Sigmoid(x))));

    private static void Put<T>(Gradient<T> into, double[] values)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        if (into.Wanted) Write(into.Into, values);
    }

    // f(x).
    private double[] Input(double[] x) => !Inner.Gated
        ? x
        : Rounded([.. x[..(x.Length / 2)].Zip(
            x[(x.Length / 2)..], (gate, up) => gate * Sigmoid(gate) * up)]);

    private double[] Low<T>(in CpuCall<T> call, double[] x)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        int rows = call.Output.Rows, rank = call.In(3).Rows;
        double[] mask = Mask(call, rows, call.In(3).Cols);
        return Rounded(Product(
            [.. x.Zip(mask, (v, m) => v * m)], Transposed(call.In(3)), rows, rank));
    }

    private double[] Mask<T>(in CpuCall<T> call, int rows, int cols)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T> =>
        MaskOf(Inner.Layer, Inner.Dropout, call.Random, rows, cols);

    // A product that is added to what is there.
    private double[] Added(double[] product) => CudaUnderTest.IsReal ? Rounded(product) : product;

    private double[] Rounded(double[] values) =>
        Kernels.Cases.Storage.Round(values, Storage);
}
