using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Products of matrices that lie in a core's cache, on the calling thread: chunks of 64 tokens by
/// heads. Sizes are padded: n to <see cref="Cols"/>, m to <see cref="Rows"/>. Sums run over k in
/// order, whatever m and n.
/// </summary>
internal static unsafe class SmallProduct<TLanes, TVector, T>
    where TLanes : struct, ILanes<TVector, T>
    where TVector : struct
    where T : unmanaged
{
    /// <summary>Rows of a tile of registers.</summary>
    public const int Rows = 4;

    /// <summary>Columns of a tile of registers: two vectors.</summary>
    public static int Cols => 2 * TLanes.Count;

    /// <summary>
    /// c[i * cRow + j] = sum over p of a[i * aRow + p * aCol] * b[p * bRow + j], or adds it.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Run(T* a, nint aRow, nint aCol, T* b, nint bRow, T* c, nint cRow,
        int m, int n, int k, bool add)
    {
        for (int j = 0; j < n; j += Cols)
            for (int i = 0; i < m; i += Rows)
                Tile(a + (i * aRow), aRow, aCol, b + j, bRow, c + (i * cRow) + j, cRow, k, add);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Tile(T* a, nint aRow, nint aCol, T* b, nint bRow, T* c, nint cRow, int k,
        bool add)
    {
        T* a1 = a + aRow, a2 = a1 + aRow, a3 = a2 + aRow;
        T* second = b + TLanes.Count;
        TVector c00 = default, c01 = default, c10 = default, c11 = default;
        TVector c20 = default, c21 = default, c30 = default, c31 = default;
        for (int p = 0; p < k; p++)
        {
            TVector left = TLanes.Load(b), right = TLanes.Load(second);
            TVector value = TLanes.Broadcast(*a);
            c00 = TLanes.Fma(value, left, c00);
            c01 = TLanes.Fma(value, right, c01);
            value = TLanes.Broadcast(*a1);
            c10 = TLanes.Fma(value, left, c10);
            c11 = TLanes.Fma(value, right, c11);
            value = TLanes.Broadcast(*a2);
            c20 = TLanes.Fma(value, left, c20);
            c21 = TLanes.Fma(value, right, c21);
            value = TLanes.Broadcast(*a3);
            c30 = TLanes.Fma(value, left, c30);
            c31 = TLanes.Fma(value, right, c31);
            a += aCol;
            a1 += aCol;
            a2 += aCol;
            a3 += aCol;
            b += bRow;
            second += bRow;
        }

        Store(c, c00, c01, add);
        Store(c + cRow, c10, c11, add);
        Store(c + (2 * cRow), c20, c21, add);
        Store(c + (3 * cRow), c30, c31, add);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Store(T* c, TVector left, TVector right, bool add)
    {
        if (add)
        {
            left = TLanes.Add(left, TLanes.Load(c));
            right = TLanes.Add(right, TLanes.Load(c + TLanes.Count));
        }

        TLanes.Store(c, left);
        TLanes.Store(c + TLanes.Count, right);
    }
}
