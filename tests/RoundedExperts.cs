using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using static MiniCpmNative.Tests.RoundedLora;

namespace MiniCpmNative.Tests;

/// <summary>
/// <see cref="Experts"/> term by term in double, that rounds to a storage type what lies between
/// the products of a GPU: the activated rows, each expert's part of y, z = W1^T dy, the gradients
/// of gate and up, the weighted rows and each expert's part of dx.
/// </summary>
internal sealed record RoundedExperts(Experts Inner, DType Storage) : RoundedOp(Inner, Storage)
{
    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Inner.CpuForward(call);
        var y = new double[call.Output.Count];
        int width = call.Output.Cols;
        foreach (Term t in Terms(call))
        {
            double[] a = Rounded([.. t.Gate.Zip(t.Up, (p, q) => p * Sigmoid(p) * q)]);
            double[] own = Rounded(Product(a, t.DownAcross, 1, width));
            for (int c = 0; c < width; c++) y[(t.Row * width) + c] += t.Weight * own[c];
        }

        Write(call.Output, y);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
        Inner.CpuBackward(call);
        int width = call.OutputGradient.Cols, chosen = Inner.Chosen;
        double[] dy = Doubles(call.OutputGradient), x = Doubles(call.In(0));
        double[] dx = new double[x.Length], dw = new double[call.In(2).Count],
            dDown = new double[call.In(3).Count], dz = new double[call.In(1).Count];
        Term[] terms = [.. Terms(call)];
        var dg = new double[terms.Length];
        for (int n = 0; n < terms.Length; n++)
        {
            Term t = terms[n];
            int inner = t.Gate.Length;
            double[] own = dy[(t.Row * width)..((t.Row + 1) * width)];
            double[] z = Rounded(Product(own, Transposed(t.DownAcross, inner, width), 1, inner));
            double[] a = [.. t.Gate.Zip(t.Up, (p, q) => p * Sigmoid(p) * q)];
            dg[n] = a.Zip(z, (p, q) => p * q).Sum();
            double[] weighed = Rounded([.. a.Select(v => t.Weight * v)]);
            double[] both = Rounded(
            [
                .. t.Gate.Select((p, i) => t.Weight * z[i] * t.Up[i] * Sigmoid(p)
                    * (1 + (p * (1 - Sigmoid(p))))),
                .. t.Gate.Select((p, i) => t.Weight * z[i] * p * Sigmoid(p)),
            ]);
            double[] back = Rounded(Product(both, t.GateAndUp, 1, width));
            for (int c = 0; c < width; c++)
            {
                dx[(t.Row * width) + c] += back[c];
                for (int i = 0; i < inner; i++)
                    dDown[(((t.Expert * width) + c) * inner) + i] += own[c] * weighed[i];
                for (int i = 0; i < 2 * inner; i++)
                    dw[(((t.Expert * 2 * inner) + i) * width) + c] +=
                        both[i] * x[(t.Row * width) + c];
            }
        }

        for (int n = 0; n < terms.Length; n++)
        {
            int first = n / chosen * chosen;
            double mean = Enumerable.Range(first, chosen).Sum(i => terms[i].Weight * dg[i]);
            dz[(terms[n].Row * call.In(1).Cols) + terms[n].Expert] =
                terms[n].Weight * (dg[n] - mean);
        }

        double[][] all = [dx, dz, dw, dDown];
        for (int i = 0; i < all.Length; i++)
            if (call.Gradient(i) is { Wanted: true } into) Write(into.Into, all[i]);
    }

    private static double Sigmoid(double x) => 1 / (1 + Math.Exp(-x));

    // In the order of the rows and of their choice.
    private IEnumerable<Term> Terms<T>(CpuCall<T> call)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        double[] w = Doubles(call.In(2)), down = Doubles(call.In(3)), g = Doubles(call.Saved(1)),
            hidden = Rounded(Doubles(call.Saved(2)));
        int width = call.In(2).Cols, inner = call.In(3).Cols;
        var routing = new Routing(call.In(1).Cols, call.In(0).Rows, Inner.Chosen);
        int[] ints = new int[routing.Count];
        for (int i = 0; i < routing.Tiles; i++) ints[i] = call.SavedInts(0)[i];
        return Enumerable.Range(0, routing.Terms).Select(n =>
        {
            int e = ints[routing.ExpertOf + n], place = ints[routing.PlaceOf + n];
            int gate = place * inner, up = (routing.Terms + place) * inner;
            return new Term(n / Inner.Chosen, e, g[n], hidden[gate..(gate + inner)],
                hidden[up..(up + inner)], w[(e * 2 * inner * width)..((e + 1) * 2 * inner * width)],
                Transposed(down[(e * width * inner)..((e + 1) * width * inner)], width, inner));
        });
    }

    private sealed record Term(int Row, int Expert, double Weight, double[] Gate, double[] Up,
        double[] GateAndUp, double[] DownAcross);
}
