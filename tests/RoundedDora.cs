using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cases;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using static MiniCpmNative.Tests.RoundedLora;

namespace MiniCpmNative.Tests;

/// <summary>
/// <see cref="DoraLinear"/> that rounds to a storage type what is stored in it between two products
/// on a GPU, as <see cref="RoundedLora"/> does: h, the adapter's part, u, y before its columns are
/// scaled, c * dy, t, and the parts of dx. Loops in double.
/// </summary>
internal sealed record RoundedDora(DoraLinear Inner, DType Storage) : RoundedOp(Inner, Storage)
{
    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Inner.CpuForward(call);
        Matrix<T> x = call.In(0), y = call.Output, bias = call.In(2);
        double[] mask = MaskOf(Inner.Layer, Inner.Dropout, call.Random, x.Rows, x.Cols);
        double[] dropped = [.. Doubles(x).Zip(mask, (v, m) => v * m)];
        double[] adapter = Rounded(Scaled(Product(Rounded(Doubles(call.Saved(0))),
            Transposed(call.In(4)), y.Rows, y.Cols), Inner.Scale));
        double[] part = Added(Product(dropped, Transposed(call.In(1)), y.Rows, y.Cols));
        double[] u = Rounded(Sum(adapter, part)), result = new double[y.Count];
        Write(call.Saved(1), u);
        if (call.Random.Dropout && Inner.Dropout > 0)
        {
            result = Rounded(Product(Doubles(x), Transposed(call.In(1)), y.Rows, y.Cols));
            result = Rounded(Sum(result, Scaled(part, -1)));
        }

        double[] m = Doubles(call.In(5)), n = Doubles(call.In(6));
        for (int i = 0; i < result.Length; i++)
        {
            int c = i % y.Cols;
            result[i] += m[c] / n[c] * u[i];
            if (bias.Exists) result[i] += double.CreateChecked(bias[c]);
        }

        Write(y, result);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Inner.CpuBackward(call);
        Matrix<T> x = call.In(0);
        int rows = x.Rows, cols = x.Cols, rank = call.In(4).Cols, outputs = call.In(4).Rows;
        double[] mask = MaskOf(Inner.Layer, Inner.Dropout, call.Random, rows, cols);
        double[] dy = Doubles(call.OutputGradient), bb = Doubles(call.In(4));
        double[] m = Doubles(call.In(5)), n = Doubles(call.In(6));
        double[] g = Rounded([.. dy.Select((v, i) => v * m[i % outputs] / n[i % outputs])]);
        double[] t = Rounded(Scaled(Product(g, bb, rows, rank), Inner.Scale));
        if (call.Gradient(4) is { Wanted: true } dbb)
            Write(dbb.Into, Scaled(Product(Transposed(g, rows, outputs),
                Rounded(Doubles(call.Saved(0))), outputs, rank), Inner.Scale));
        if (call.Gradient(3) is { Wanted: true } da)
            Write(da.Into, Product(Transposed(t, rows, rank),
                [.. Doubles(x).Zip(mask, (v, k) => v * k)], rank, cols));
        if (call.Gradient(0) is not { Wanted: true } dx) return;
        double[] w = Doubles(call.In(1));
        double[] part = Rounded(Product(t, Doubles(call.In(3)), rows, cols));
        if (!call.Random.Dropout || Inner.Dropout == 0)
        {
            Write(dx.Into, Sum(part, Added(Product(g, w, rows, cols))));
            return;
        }

        double[] e = Rounded(
            [.. dy.Select((v, i) => v * ((m[i % outputs] / n[i % outputs]) - 1))]);
        part = Rounded(Sum(part, Added(Product(e, w, rows, cols))));
        double[] frozen = Rounded(Product(dy, w, rows, cols));
        Write(dx.Into, Sum(frozen, [.. part.Zip(mask, (v, k) => v * k)]));
    }

    private static double[] Sum(double[] a, double[] b) => [.. a.Zip(b, (p, q) => p + q)];

    private static double[] Scaled(double[] a, double factor) => [.. a.Select(v => factor * v)];
}
