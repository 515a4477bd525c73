using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Tiles of attention, all stored lanes-last: element (row, lane) at row * Width + lane, the lanes
/// being queries (forward, dq) or keys (dk, dv) and Width three registers. Both kinds of product
/// then have one form, tile[rows, Width] = a[rows, depth] tile[depth, Width], in which a is read in
/// place, one element at a time, whichever way its rows run; and softmax needs no sums across a
/// register.
/// </summary>
internal static unsafe partial class FlashAttention<TLanes, TVector, T>
    where TLanes : struct, ILanes<TVector, T>
    where TVector : struct
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    public static int Width
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => 3 * TLanes.Count;
    }

    /// <summary>
    /// c[r, lane] = c[r, lane] * keep[lane] + sum_i a[r * rowStep + i * depthStep] * b[i, lane],
    /// c[rows, Width], b[depth, Width]; without keep the old c counts as zero and is not read.
    /// </summary>
    public static void Product(
        T* c, T* keep, T* a, nint rowStep, nint depthStep, int rows, T* b, int depth)
    {
        for (int r = 0; r < rows; r += TLanes.TileRows)
        {
            T* rowC = c + ((nint)r * Width);
            T* rowA = a + (r * rowStep);
            if (TLanes.TileRows == 8)
                Rows8(rowC, keep, rowA, rowStep, depthStep, rows - r, b, depth);
            else
                Rows4(rowC, keep, rowA, rowStep, depthStep, rows - r, b, depth);
        }
    }

    // 24 accumulators, three vectors of b and one broadcast fill 28 of 32 registers. Rows past the
    // end repeat the last one and are not stored.
    private static void Rows8(
        T* c, T* keep, T* a, nint rowStep, nint depthStep, int rows, T* b, int depth)
    {
        int last = Math.Min(rows, 8) - 1;
        T* a1 = a + (Math.Min(1, last) * rowStep);
        T* a2 = a + (Math.Min(2, last) * rowStep);
        T* a3 = a + (Math.Min(3, last) * rowStep);
        T* a4 = a + (Math.Min(4, last) * rowStep);
        T* a5 = a + (Math.Min(5, last) * rowStep);
        T* a6 = a + (Math.Min(6, last) * rowStep);
        T* a7 = a + (Math.Min(7, last) * rowStep);
        TVector c00 = default, c01 = default, c02 = default;
        TVector c10 = default, c11 = default, c12 = default;
        TVector c20 = default, c21 = default, c22 = default;
        TVector c30 = default, c31 = default, c32 = default;
        TVector c40 = default, c41 = default, c42 = default;
        TVector c50 = default, c51 = default, c52 = default;
        TVector c60 = default, c61 = default, c62 = default;
        TVector c70 = default, c71 = default, c72 = default;
        nint i = 0;
        for (; depth > 0; depth--, i += depthStep, b += Width)
        {
            TVector b0 = TLanes.Load(b);
            TVector b1 = TLanes.Load(b + TLanes.Count);
            TVector b2 = TLanes.Load(b + (2 * TLanes.Count));
            TVector x = TLanes.Broadcast(a[i]);
            c00 = TLanes.Fma(x, b0, c00);
            c01 = TLanes.Fma(x, b1, c01);
            c02 = TLanes.Fma(x, b2, c02);
            x = TLanes.Broadcast(a1[i]);
            c10 = TLanes.Fma(x, b0, c10);
            c11 = TLanes.Fma(x, b1, c11);
            c12 = TLanes.Fma(x, b2, c12);
            x = TLanes.Broadcast(a2[i]);
            c20 = TLanes.Fma(x, b0, c20);
            c21 = TLanes.Fma(x, b1, c21);
            c22 = TLanes.Fma(x, b2, c22);
            x = TLanes.Broadcast(a3[i]);
            c30 = TLanes.Fma(x, b0, c30);
            c31 = TLanes.Fma(x, b1, c31);
            c32 = TLanes.Fma(x, b2, c32);
            x = TLanes.Broadcast(a4[i]);
            c40 = TLanes.Fma(x, b0, c40);
            c41 = TLanes.Fma(x, b1, c41);
            c42 = TLanes.Fma(x, b2, c42);
            x = TLanes.Broadcast(a5[i]);
            c50 = TLanes.Fma(x, b0, c50);
            c51 = TLanes.Fma(x, b1, c51);
            c52 = TLanes.Fma(x, b2, c52);
            x = TLanes.Broadcast(a6[i]);
            c60 = TLanes.Fma(x, b0, c60);
            c61 = TLanes.Fma(x, b1, c61);
            c62 = TLanes.Fma(x, b2, c62);
            x = TLanes.Broadcast(a7[i]);
            c70 = TLanes.Fma(x, b0, c70);
            c71 = TLanes.Fma(x, b1, c71);
            c72 = TLanes.Fma(x, b2, c72);
        }

        StoreRow(c, keep, c00, c01, c02);
        if (rows > 1) StoreRow(c + Width, keep, c10, c11, c12);
        if (rows > 2) StoreRow(c + (2 * Width), keep, c20, c21, c22);
        if (rows > 3) StoreRow(c + (3 * Width), keep, c30, c31, c32);
        if (rows > 4) StoreRow(c + (4 * Width), keep, c40, c41, c42);
        if (rows > 5) StoreRow(c + (5 * Width), keep, c50, c51, c52);
        if (rows > 6) StoreRow(c + (6 * Width), keep, c60, c61, c62);
        if (rows > 7) StoreRow(c + (7 * Width), keep, c70, c71, c72);
    }

    // The same for 16 registers: 12 accumulators, three vectors of b, one broadcast.
    private static void Rows4(
        T* c, T* keep, T* a, nint rowStep, nint depthStep, int rows, T* b, int depth)
    {
        int last = Math.Min(rows, 4) - 1;
        T* a1 = a + (Math.Min(1, last) * rowStep);
        T* a2 = a + (Math.Min(2, last) * rowStep);
        T* a3 = a + (Math.Min(3, last) * rowStep);
        TVector c00 = default, c01 = default, c02 = default;
        TVector c10 = default, c11 = default, c12 = default;
        TVector c20 = default, c21 = default, c22 = default;
        TVector c30 = default, c31 = default, c32 = default;
        nint i = 0;
        for (; depth > 0; depth--, i += depthStep, b += Width)
        {
            TVector b0 = TLanes.Load(b);
            TVector b1 = TLanes.Load(b + TLanes.Count);
            TVector b2 = TLanes.Load(b + (2 * TLanes.Count));
            TVector x = TLanes.Broadcast(a[i]);
            c00 = TLanes.Fma(x, b0, c00);
            c01 = TLanes.Fma(x, b1, c01);
            c02 = TLanes.Fma(x, b2, c02);
            x = TLanes.Broadcast(a1[i]);
            c10 = TLanes.Fma(x, b0, c10);
            c11 = TLanes.Fma(x, b1, c11);
            c12 = TLanes.Fma(x, b2, c12);
            x = TLanes.Broadcast(a2[i]);
            c20 = TLanes.Fma(x, b0, c20);
            c21 = TLanes.Fma(x, b1, c21);
            c22 = TLanes.Fma(x, b2, c22);
            x = TLanes.Broadcast(a3[i]);
            c30 = TLanes.Fma(x, b0, c30);
            c31 = TLanes.Fma(x, b1, c31);
            c32 = TLanes.Fma(x, b2, c32);
        }

        StoreRow(c, keep, c00, c01, c02);
        if (rows > 1) StoreRow(c + Width, keep, c10, c11, c12);
        if (rows > 2) StoreRow(c + (2 * Width), keep, c20, c21, c22);
        if (rows > 3) StoreRow(c + (3 * Width), keep, c30, c31, c32);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void StoreRow(T* c, T* keep, TVector c0, TVector c1, TVector c2)
    {
        int n = TLanes.Count;
        if (keep is not null)
        {
            c0 = TLanes.Fma(TLanes.Load(c), TLanes.Load(keep), c0);
            c1 = TLanes.Fma(TLanes.Load(c + n), TLanes.Load(keep + n), c1);
            c2 = TLanes.Fma(TLanes.Load(c + (2 * n)), TLanes.Load(keep + (2 * n)), c2);
        }

        TLanes.Store(c, c0);
        TLanes.Store(c + n, c1);
        TLanes.Store(c + (2 * n), c2);
    }
}
