using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Brings operands into the order in which the tile kernel reads them: A in panels [k][TileRows],
/// B in panels [k][P], both contiguous along k, so that the inner loop touches few pages.
/// </summary>
internal static unsafe class GemmPack<T, V, I>
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
    where V : unmanaged
    where I : ISimd<T, V>
{
    private static int Panel => PackedMatrix.PanelRows;

    /// <summary>
    /// One panel of A, m0.. and k0..: to[k * TileRows + i] = a[i, k] for the rows there are; lanes
    /// beyond them are left undefined. Writes up to a vector beyond the panel.
    /// </summary>
    public static void Left(in GemmPlan<T> plan, int m0, int rows, int k0, int k, T* to)
    {
        T* a = plan.A + (m0 * plan.ARow) + (k0 * plan.ACol);
        // Whether a whole vector of rows may be read.
        bool wide = plan.M - m0 >= GemmPlan<T>.LeftPad;
        Left(a, plan.ARow, plan.ACol, rows, k, to, wide);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Left(T* a, nint row, nint col, int rows, int k, T* to, bool wide)
    {
        int p = 0;
        if (col == 1)
        {
            int w = I.TileRows <= I.Width ? I.Width : int.MaxValue;
            for (; p <= k - w; p += w)
            {
                T* into = to + (p * I.TileRows);
                I.Transpose<Native<T>>((byte*)(a + p), row, rows, into, I.TileRows);
            }

            for (; p < k; p++)
                for (int i = 0; i < rows; i++) to[(p * I.TileRows) + i] = a[(i * row) + p];
            return;
        }

        for (; p < k; p++)
        {
            T* from = a + (p * col);
            T* into = to + (p * I.TileRows);
            int i = 0;
            if (wide)
                for (; i < rows; i += I.Width) I.Store(into + i, I.Load(from + i));
            else
                for (; i < rows; i++) into[i] = from[i];
        }
    }

    /// <summary>
    /// Columns n0 .. n0 + cols and k0 .. k0 + k of B as panels [cols / P][k][P].
    /// </summary>
    public static void Right(in GemmPlan<T> plan, int n0, int cols, int k0, int k, T* to)
    {
        switch (plan.BType)
        {
            case DType.BF16: Right<BFloat16>(plan, n0, cols, k0, k, to); break;
            case DType.F16: Right<Half16>(plan, n0, cols, k0, k, to); break;
            default: Right<Native<T>>(plan, n0, cols, k0, k, to); break;
        }
    }

    private static void Right<S>(in GemmPlan<T> plan, int n0, int cols, int k0, int k, T* to)
        where S : IStorage
    {
        nint stride = plan.BStride;
        int size = S.Size;
        for (int n = 0; n < cols; n += Panel, to += (nint)k * Panel)
        {
            int width = Math.Min(Panel, cols - n);
            byte* b = plan.B;
            switch (plan.BLayout)
            {
                case RightLayout.Rows:
                    Copy<S>(b + (((k0 * stride) + n0 + n) * size), stride, k, width, to);
                    break;
                case RightLayout.Panels:
                    b += (((n0 + n) / Panel * stride) + ((nint)k0 * Panel)) * size;
                    Copy<S>(b, Panel, k, width, to);
                    break;
                case RightLayout.Transposed:
                    Transpose<S>(b + ((((n0 + n) * stride) + k0) * size), stride, k, width, to);
                    break;
                default:
                    for (int p = 0; p < k; p += Panel)
                    {
                        nint at = ((k0 + p) / Panel * stride) + ((nint)(n0 + n) * Panel);
                        int depth = Math.Min(Panel, k - p);
                        Transpose<S>(b + (at * size), Panel, depth, width, to + (p * Panel));
                    }

                    break;
            }
        }
    }

    /// <summary>to[p * P + j] = from[p * stride + j], j below width.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Copy<S>(byte* from, nint stride, int k, int width, T* to)
        where S : IStorage
    {
        nint step = stride * S.Size;
        for (int p = 0; p < k; p++, from += step, to += Panel)
        {
            int j = 0;
            for (; j + I.Width <= width; j += I.Width)
                I.Store(to + j, S.Load<T, V, I>(from + (j * S.Size)));
            for (; j < width; j++) to[j] = S.Scalar<T>(from + (j * S.Size));
        }
    }

    /// <summary>
    /// to[p * P + j] = from[j * stride + p], j below width. Two blocks along p at a time, so that
    /// a cache line of 16-bit storage is used up before long strides evict it.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Transpose<S>(byte* from, nint stride, int k, int width, T* to)
        where S : IStorage
    {
        int w = I.Width, whole = k / w * w;
        for (int p = 0; p < whole; p += 2 * w)
        {
            for (int j = 0; j < width; j += w)
            {
                byte* rows = from + (((j * stride) + p) * S.Size);
                int count = Math.Min(w, width - j);
                T* into = to + (p * Panel) + j;
                I.Transpose<S>(rows, stride, count, into, Panel);
                if (p + w < whole)
                    I.Transpose<S>(rows + (w * S.Size), stride, count, into + (w * Panel), Panel);
            }
        }

        for (int p = whole; p < k; p++)
            for (int j = 0; j < width; j++)
                to[(p * Panel) + j] = S.Scalar<T>(from + (((j * stride) + p) * S.Size));
    }
}
