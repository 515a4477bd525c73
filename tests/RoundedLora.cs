using System.Numerics;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Tests;

/// <summary>
/// <see cref="LoraLinear"/> that rounds to a storage type what is stored in it between two products
/// on a GPU, and in PyTorch, while the CPU keeps float: h, t = Scale * dy bb, and the adapter's
/// part of y and dx before the frozen weight's is added. The real cuBLAS, unlike the emulated one,
/// also rounds a product before it adds what is there (seen on an H100 with cuBLAS 13.1, 600 x 24
/// of depth 16). Loops in double.
/// </summary>
internal sealed record RoundedLora(LoraLinear Inner, DType Storage) : RoundedOp(Inner, Storage)
{
    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Inner.CpuForward(call);
        Matrix<T> y = call.Output, bias = call.In(2);
        double[] h = Rounded(Doubles(call.Saved(0)));
        double[] adapter = Product(h, Transposed(call.In(4)), y.Rows, y.Cols);
        for (int i = 0; i < adapter.Length; i++)
            adapter[i] *= Inner.Scale;
        adapter = Added(adapter);
        for (int i = 0; i < adapter.Length && bias.Exists; i++)
            adapter[i] += double.CreateChecked(bias[i % y.Cols]);
        double[] frozen =
            Added(Product(Doubles(call.In(0)), Transposed(call.In(1)), y.Rows, y.Cols));
        Write(y, [.. Rounded(adapter).Zip(frozen, (p, q) => p + q)]);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Inner.CpuBackward(call);
        Matrix<T> x = call.In(0), bb = call.In(4);
        int rows = x.Rows, cols = x.Cols, rank = bb.Cols;
        double[] mask = MaskOf(Inner, call.Random, rows, cols), dy = Doubles(call.OutputGradient);
        double[] t = Rounded(
            [.. Product(dy, Doubles(bb), rows, rank).Select(v => Inner.Scale * v)]);
        if (call.Gradient(3) is { Wanted: true } da)
        {
            double[] dropped = [.. Doubles(x).Zip(mask, (v, m) => v * m)];
            Write(da.Into, Product(Transposed(t, rows, rank), dropped, rank, cols));
        }

        if (call.Gradient(0) is { Wanted: true } dx)
        {
            double[] adapter =
                [.. Product(t, Doubles(call.In(3)), rows, cols).Zip(mask, (v, m) => v * m)];
            double[] frozen = Added(Product(dy, Doubles(call.In(1)), rows, cols));
            Write(dx.Into, [.. Rounded(adapter).Zip(frozen, (p, q) => p + q)]);
        }
    }

    /// <summary>What an adapter multiplies each element of x by.</summary>
    public static double[] MaskOf(LoraLinear op, Randomness random, int rows, int cols) =>
        MaskOf(op.Layer, op.Dropout, random, rows, cols);

    /// <summary>The same by the adapter's key and the probability of a zero.</summary>
    public static unsafe double[] MaskOf(
        int layer, double p, Randomness random, int rows, int cols)
    {
        var factors = new double[rows * cols];
        if (!random.Dropout || p == 0)
        {
            Array.Fill(factors, 1);
            return factors;
        }

        int drawn = Philox.DrawnCols(cols);
        var keep = new byte[drawn];
        for (int i = 0; i < factors.Length; i++)
        {
            if (i % cols == 0)
                fixed (byte* to = keep)
                    Philox.Mask(random, layer, Philox.Threshold(p), (long)i / cols * drawn, cols,
                        to);
            factors[i] = keep[i % cols] * Philox.Scale(p);
        }

        return factors;
    }

    internal static double[] Product(double[] a, double[] b, int rows, int cols)
    {
        var c = new double[rows * cols];
        int inner = rows == 0 ? 0 : a.Length / rows;
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < inner; k++)
                for (int n = 0; n < cols; n++)
                    c[(r * cols) + n] += a[(r * inner) + k] * b[(k * cols) + n];
        return c;
    }

    internal static double[] Transposed<T>(Matrix<T> m)
        where T : unmanaged, INumber<T> => Transposed(Doubles(m), m.Rows, m.Cols);

    internal static double[] Transposed(double[] values, int rows, int cols)
    {
        var result = new double[values.Length];
        for (int i = 0; i < values.Length; i++) result[(i % cols * rows) + (i / cols)] = values[i];
        return result;
    }

    internal static double[] Doubles<T>(Matrix<T> m)
        where T : unmanaged, INumber<T>
    {
        var values = new double[m.Count];
        for (int i = 0; i < values.Length; i++) values[i] = double.CreateChecked(m[i]);
        return values;
    }

    internal static void Write<T>(Matrix<T> m, double[] values)
        where T : unmanaged, INumber<T>
    {
        for (int i = 0; i < values.Length; i++) m[i] = T.CreateChecked(values[i]);
    }
}
