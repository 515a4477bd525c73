using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>Rows of a register tile, known when the kernel is compiled.</summary>
internal interface IRows
{
    static abstract int Count { get; }
}

internal readonly struct Rows1 : IRows
{
    public static int Count => 1;
}

internal readonly struct Rows2 : IRows
{
    public static int Count => 2;
}

internal readonly struct Rows4 : IRows
{
    public static int Count => 4;
}

internal readonly struct Rows6 : IRows
{
    public static int Count => 6;
}

internal readonly struct Rows8 : IRows
{
    public static int Count => 8;
}

internal readonly struct Rows12 : IRows
{
    public static int Count => 12;
}

/// <summary>
/// Where row i of the left operand is: one element further when packed, else a stride.
/// </summary>
internal unsafe interface ILeft
{
    static abstract T At<T>(T* a, nint stride, int i)
        where T : unmanaged;
}

internal readonly unsafe struct PackedLeft : ILeft
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T At<T>(T* a, nint stride, int i)
        where T : unmanaged => a[i];
}

internal readonly unsafe struct StridedLeft : ILeft
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T At<T>(T* a, nint stride, int i)
        where T : unmanaged => a[i * stride];
}

/// <summary>
/// The innermost kernel of a matrix product: a tile of C, up to 12 rows by two vectors, stays in
/// registers while k runs; every step loads two vectors of B and broadcasts one element of A per
/// row. With 24 multiply-adds for 14 loads the arithmetic units are the bound. One text serves all
/// instruction sets and tile sizes: rows beyond R.Count vanish when R is compiled in.
/// </summary>
internal static unsafe partial class GemmTile<T, V, I, R, L>
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
    where V : unmanaged
    where I : ISimd<T, V>
    where R : IRows
    where L : ILeft
{
    /// <summary>Fewer multiply-adds are over before C could arrive.</summary>
    private const int PrefetchDepth = 64;

    /// <summary>
    /// C[R, 2 Width] = alpha * A B + beta * C + bias; A steps by aStep per k and B by bStep,
    /// C is not read when beta is 0, bias may be null.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Two(
        nint k, T* a, nint aRow, nint aStep, T* b, nint bStep, in GemmOut<T> to)
    {
        V c0 = I.Zero, d0 = I.Zero;
        V c1 = I.Zero, d1 = I.Zero;
        V c2 = I.Zero, d2 = I.Zero;
        V c3 = I.Zero, d3 = I.Zero;
        V c4 = I.Zero, d4 = I.Zero;
        V c5 = I.Zero, d5 = I.Zero;
        V c6 = I.Zero, d6 = I.Zero;
        V c7 = I.Zero, d7 = I.Zero;
        V c8 = I.Zero, d8 = I.Zero;
        V c9 = I.Zero, d9 = I.Zero;
        V c10 = I.Zero, d10 = I.Zero;
        V c11 = I.Zero, d11 = I.Zero;
        T* c = to.C;
        nint stride = to.Stride;
        for (int i = 0; i < R.Count && k >= PrefetchDepth; i++)
        {
            I.Prefetch(c + (i * stride));
            I.Prefetch(c + (i * stride) + I.Width);
        }

        for (; k > 0; k--)
        {
            V b0 = I.Load(b), b1 = I.Load(b + I.Width);
            V x = I.Broadcast(L.At(a, aRow, 0));
            c0 = I.Fma(x, b0, c0);
            d0 = I.Fma(x, b1, d0);
            if (R.Count > 1)
            {
                x = I.Broadcast(L.At(a, aRow, 1));
                c1 = I.Fma(x, b0, c1);
                d1 = I.Fma(x, b1, d1);
            }

            if (R.Count > 2)
            {
                x = I.Broadcast(L.At(a, aRow, 2));
                c2 = I.Fma(x, b0, c2);
                d2 = I.Fma(x, b1, d2);
            }

            if (R.Count > 3)
            {
                x = I.Broadcast(L.At(a, aRow, 3));
                c3 = I.Fma(x, b0, c3);
                d3 = I.Fma(x, b1, d3);
            }

            if (R.Count > 4)
            {
                x = I.Broadcast(L.At(a, aRow, 4));
                c4 = I.Fma(x, b0, c4);
                d4 = I.Fma(x, b1, d4);
            }

            if (R.Count > 5)
            {
                x = I.Broadcast(L.At(a, aRow, 5));
                c5 = I.Fma(x, b0, c5);
                d5 = I.Fma(x, b1, d5);
            }

            if (R.Count > 6)
            {
                x = I.Broadcast(L.At(a, aRow, 6));
                c6 = I.Fma(x, b0, c6);
                d6 = I.Fma(x, b1, d6);
            }

            if (R.Count > 7)
            {
                x = I.Broadcast(L.At(a, aRow, 7));
                c7 = I.Fma(x, b0, c7);
                d7 = I.Fma(x, b1, d7);
            }

            if (R.Count > 8)
            {
                x = I.Broadcast(L.At(a, aRow, 8));
                c8 = I.Fma(x, b0, c8);
                d8 = I.Fma(x, b1, d8);
            }

            if (R.Count > 9)
            {
                x = I.Broadcast(L.At(a, aRow, 9));
                c9 = I.Fma(x, b0, c9);
                d9 = I.Fma(x, b1, d9);
            }

            if (R.Count > 10)
            {
                x = I.Broadcast(L.At(a, aRow, 10));
                c10 = I.Fma(x, b0, c10);
                d10 = I.Fma(x, b1, d10);
            }

            if (R.Count > 11)
            {
                x = I.Broadcast(L.At(a, aRow, 11));
                c11 = I.Fma(x, b0, c11);
                d11 = I.Fma(x, b1, d11);
            }

            a += aStep;
            b += bStep;
        }

        V alpha = I.Broadcast(to.Alpha), beta = I.Broadcast(to.Beta);
        bool read = to.Beta != T.Zero;
        V bias0 = to.Bias is null ? I.Zero : I.Load(to.Bias);
        V bias1 = to.Bias is null ? I.Zero : I.Load(to.Bias + I.Width);
        Put(c, c0, alpha, beta, bias0, read);
        Put(c + I.Width, d0, alpha, beta, bias1, read);

        if (R.Count > 1)
        {
            c += stride;
            Put(c, c1, alpha, beta, bias0, read);
            Put(c + I.Width, d1, alpha, beta, bias1, read);
        }

        if (R.Count > 2)
        {
            c += stride;
            Put(c, c2, alpha, beta, bias0, read);
            Put(c + I.Width, d2, alpha, beta, bias1, read);
        }

        if (R.Count > 3)
        {
            c += stride;
            Put(c, c3, alpha, beta, bias0, read);
            Put(c + I.Width, d3, alpha, beta, bias1, read);
        }

        if (R.Count > 4)
        {
            c += stride;
            Put(c, c4, alpha, beta, bias0, read);
            Put(c + I.Width, d4, alpha, beta, bias1, read);
        }

        if (R.Count > 5)
        {
            c += stride;
            Put(c, c5, alpha, beta, bias0, read);
            Put(c + I.Width, d5, alpha, beta, bias1, read);
        }

        if (R.Count > 6)
        {
            c += stride;
            Put(c, c6, alpha, beta, bias0, read);
            Put(c + I.Width, d6, alpha, beta, bias1, read);
        }

        if (R.Count > 7)
        {
            c += stride;
            Put(c, c7, alpha, beta, bias0, read);
            Put(c + I.Width, d7, alpha, beta, bias1, read);
        }

        if (R.Count > 8)
        {
            c += stride;
            Put(c, c8, alpha, beta, bias0, read);
            Put(c + I.Width, d8, alpha, beta, bias1, read);
        }

        if (R.Count > 9)
        {
            c += stride;
            Put(c, c9, alpha, beta, bias0, read);
            Put(c + I.Width, d9, alpha, beta, bias1, read);
        }

        if (R.Count > 10)
        {
            c += stride;
            Put(c, c10, alpha, beta, bias0, read);
            Put(c + I.Width, d10, alpha, beta, bias1, read);
        }

        if (R.Count > 11)
        {
            c += stride;
            Put(c, c11, alpha, beta, bias0, read);
            Put(c + I.Width, d11, alpha, beta, bias1, read);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Put(T* c, V sum, V alpha, V beta, V bias, bool read)
    {
        V value = I.Fma(alpha, sum, bias);
        if (read) value = I.Fma(beta, I.Load(c), value);
        I.Store(c, value);
    }
}
