using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using static MiniCpmNative.Tests.RoundedLora;

namespace MiniCpmNative.Tests;

/// <summary>
/// <see cref="Linears"/> that rounds to a storage type what a GPU stores in it on the way: what
/// <see cref="RoundedLora"/> rounds, and the layers' results before biases and rotations. Weights
/// that do not lie together. Loops in double.
/// </summary>
internal sealed record RoundedLinears(Linears Inner, DType Storage) : RoundedOp(Inner, Storage)
{
    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Inner.CpuForward(call);
        double[] x = Doubles(call.In(0)), y = Doubles(call.Output);
        int rows = call.In(0).Rows, begin = 0, adapter = 0;
        for (int i = 0; i < Inner.Parts.Count; i++)
        {
            int w = 1 + (4 * i), cols = Inner.Parts[i].Outputs;
            double[] own = new double[rows * cols], bias = new double[cols];
            if (call.In(w + 1).Exists) bias = Doubles(call.In(w + 1));
            if (call.In(w + 2).Exists)
            {
                double[] h = Rounded(Kept(call, adapter++, rows));
                own = [.. Product(h, Transposed(call.In(w + 3)), rows, cols)
                    .Select(v => v * Inner.Scale)];
            }

            if (Inner.HeadDim == 0) own = [.. own.Select((v, at) => v + bias[at % cols])];
            own = [.. Rounded(own).Zip(
                Added(Product(x, Transposed(call.In(w)), rows, cols)), (p, q) => p + q)];
            if (Inner.HeadDim > 0)
                own = Turned(call, i, [.. Rounded(own).Select((v, at) => v + bias[at % cols])], 1);
            own.CopyTo(y, begin);
            begin += rows * cols;
        }

        Write(call.Output, y);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Inner.CpuBackward(call);
        double[] x = Doubles(call.In(0)), all = Doubles(call.OutputGradient);
        int rows = call.In(0).Rows, inputs = call.In(0).Cols, begin = 0, adapter = 0;
        var fromAdapters = new double[rows * inputs];
        var frozen = new List<double[]>();
        for (int i = 0; i < Inner.Parts.Count; i++)
        {
            int w = 1 + (4 * i), cols = Inner.Parts[i].Outputs;
            double[] dy = all[begin..(begin += rows * cols)];
            if (Inner.HeadDim > 0) dy = Rounded(Turned(call, i, dy, -1));
            double[] turned = Transposed(dy, rows, cols);
            Put(call.Gradient(w), () => Product(turned, x, cols, inputs));
            Put(call.Gradient(w + 1), () =>
                Product([.. Enumerable.Repeat(1.0, rows)], dy, 1, cols));
            frozen.Add(Product(dy, Doubles(call.In(w)), rows, inputs));
            if (!call.In(w + 2).Exists) continue;
            int rank = call.In(w + 2).Rows;
            double[] h = Rounded(Kept(call, adapter++, rows)), bb = Doubles(call.In(w + 3));
            double[] mask = MaskOf(
                Inner.Parts[i].Layer, Inner.Dropout, call.Random, rows, inputs);
            double[] t = Rounded([.. Product(dy, bb, rows, rank).Select(v => Inner.Scale * v)]);
            Put(call.Gradient(w + 3), () =>
                [.. Product(turned, h, cols, rank).Select(v => Inner.Scale * v)]);
            Put(call.Gradient(w + 2), () => Product(
                Transposed(t, rows, rank), [.. x.Zip(mask, (v, m) => v * m)], rank, inputs));
            double[] own = Product(t, Doubles(call.In(w + 2)), rows, inputs);
            for (int at = 0; at < own.Length; at++) fromAdapters[at] += own[at] * mask[at];
        }

        if (call.Gradient(0) is not { Wanted: true } dx) return;
        double[] sum = fromAdapters;
        foreach (double[] product in frozen)
            sum = [.. Rounded(sum).Zip(Added(product), (p, q) => p + q)];
        Write(dx.Into, sum);
    }

    private static void Put<T>(Gradient<T> into, Func<double[]> values)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        if (into.Wanted) Write(into.Into, values());
    }

    private static double[] Kept<T>(in CpuCall<T> call, int adapter, int rows)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        double[] all = Doubles(call.Saved(0));
        int each = rows * call.Saved(0).Cols;
        return all[(adapter * each)..((adapter + 1) * each)];
    }

    private double[] Turned<T>(in CpuCall<T> call, int part, double[] x, double direction)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        if (part >= Inner.Rotated) return x;
        int first = 1 + (4 * Inner.Parts.Count), half = Inner.HeadDim / 2;
        int cols = Inner.Parts[part].Outputs;
        double[] cos = Doubles(call.In(first + 1)), sin = Doubles(call.In(first + 2));
        double[] y = new double[x.Length];
        for (int at = 0; at < x.Length; at++)
        {
            int k = at % Inner.HeadDim, place = (call.Ints(first)[at / cols] * half) + (k % half);
            double c = cos[place], s = direction * sin[place];
            y[at] = k < half ? (x[at] * c) - (x[at + half] * s) : (x[at] * c) + (x[at - half] * s);
        }

        return y;
    }
}
