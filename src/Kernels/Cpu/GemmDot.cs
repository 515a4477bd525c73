using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Few rows times a row-major weight: C[m, n] = alpha * x[m] . w[n] + beta * C + bias. Every weight
/// is read once and used for at most a few rows, so memory is the bound and packing would only add
/// to it: four rows of w stream side by side and the sums stay in registers until k has run.
/// </summary>
internal unsafe struct GemmDot<T, V, I, S> : IRangeBody
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
    where V : unmanaged
    where I : ISimd<T, V>
    where S : IStorage
{
    /// <summary>Columns of C, rows of w, in one item of work.</summary>
    public const int Group = 4;

    public GemmPlan<T>* Plan;

    public readonly void Run(int begin, int end, int worker)
    {
        for (int group = begin; group < end; group++)
        {
            int n = group * Group, m = 0;
            for (; m + 4 <= Plan->M; m += 4) Dots<Rows4>(m, n);
            for (; m + 2 <= Plan->M; m += 2) Dots<Rows2>(m, n);
            for (; m < Plan->M; m++) Dots<Rows1>(m, n);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private readonly void Dots<R>(int m, int n)
        where R : IRows
    {
        nint k = Plan->K, x = Plan->ARow, p = 0;
        T* a = Plan->A + (m * x);
        int last = Plan->N - 1;
        nint step = Plan->BStride * S.Size;
        byte* w0 = Plan->B + (n * step);
        byte* w1 = Plan->B + (Math.Min(n + 1, last) * step);
        byte* w2 = Plan->B + (Math.Min(n + 2, last) * step);
        byte* w3 = Plan->B + (Math.Min(n + 3, last) * step);
        V a0 = I.Zero, a1 = I.Zero, a2 = I.Zero, a3 = I.Zero;
        V b0 = I.Zero, b1 = I.Zero, b2 = I.Zero, b3 = I.Zero;
        V c0 = I.Zero, c1 = I.Zero, c2 = I.Zero, c3 = I.Zero;
        V d0 = I.Zero, d1 = I.Zero, d2 = I.Zero, d3 = I.Zero;
        for (; p + I.Width <= k; p += I.Width)
        {
            V v0 = S.Load<T, V, I>(w0 + (p * S.Size)), v1 = S.Load<T, V, I>(w1 + (p * S.Size));
            V v2 = S.Load<T, V, I>(w2 + (p * S.Size)), v3 = S.Load<T, V, I>(w3 + (p * S.Size));
            Row(I.Load(a + p), v0, v1, v2, v3, ref a0, ref a1, ref a2, ref a3);
            if (R.Count > 1) Row(I.Load(a + x + p), v0, v1, v2, v3, ref b0, ref b1, ref b2, ref b3);
            if (R.Count > 2)
            {
                Row(I.Load(a + (2 * x) + p), v0, v1, v2, v3, ref c0, ref c1, ref c2, ref c3);
                Row(I.Load(a + (3 * x) + p), v0, v1, v2, v3, ref d0, ref d1, ref d2, ref d3);
            }
        }

        Put(m, n, p, I.Sum(a0), I.Sum(a1), I.Sum(a2), I.Sum(a3));
        if (R.Count > 1) Put(m + 1, n, p, I.Sum(b0), I.Sum(b1), I.Sum(b2), I.Sum(b3));
        if (R.Count > 2)
        {
            Put(m + 2, n, p, I.Sum(c0), I.Sum(c1), I.Sum(c2), I.Sum(c3));
            Put(m + 3, n, p, I.Sum(d0), I.Sum(d1), I.Sum(d2), I.Sum(d3));
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Row(
        V x, V v0, V v1, V v2, V v3, ref V s0, ref V s1, ref V s2, ref V s3)
    {
        s0 = I.Fma(x, v0, s0);
        s1 = I.Fma(x, v1, s1);
        s2 = I.Fma(x, v2, s2);
        s3 = I.Fma(x, v3, s3);
    }

    /// <summary>
    /// Adds the elements of k that fill no vector, and writes what lies inside C.
    /// </summary>
    private readonly void Put(int m, int n, nint p, T s0, T s1, T s2, T s3)
    {
        T* sums = stackalloc T[Group];
        (sums[0], sums[1], sums[2], sums[3]) = (s0, s1, s2, s3);
        for (int i = 0; i < Group && n + i < Plan->N; i++)
        {
            byte* w = Plan->B + ((n + i) * Plan->BStride * S.Size);
            for (nint q = p; q < Plan->K; q++)
                sums[i] += Plan->A[(m * Plan->ARow) + q] * S.Scalar<T>(w + (q * S.Size));
            T* c = Plan->C + (m * Plan->CRow) + ((n + i) * Plan->CCol);
            T value = Plan->Alpha * sums[i];
            if (Plan->Bias is not null) value += Plan->Bias[n + i];
            if (Plan->Beta != T.Zero) value += Plan->Beta * *c;
            *c = value;
        }
    }
}
