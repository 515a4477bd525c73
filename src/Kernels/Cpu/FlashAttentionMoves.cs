using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Moves between rows in memory and the lanes of a tile, which are transpositions: in 4 x 4 blocks
/// where that can be done in registers, else element by element.
/// </summary>
internal static unsafe partial class FlashAttention<TLanes, TVector, T>
{
    private const int Block = 4;

    private static bool HasBlocks
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => typeof(T) == typeof(float) && Sse.IsSupported;
    }

    /// <summary>tile[d, lane] = the lane's d-th element; 0 in lanes not in use.</summary>
    private static void Gather(T* tile, in LaneRows<T> rows, T* data, nint stride, int headDim)
    {
        int lane = 0, whole = headDim / Block * Block;
        for (; HasBlocks && lane + Block <= rows.Lanes; lane += Block)
        {
            var r0 = (float*)rows.Row(data, stride, headDim, lane);
            var r1 = (float*)rows.Row(data, stride, headDim, lane + 1);
            var r2 = (float*)rows.Row(data, stride, headDim, lane + 2);
            var r3 = (float*)rows.Row(data, stride, headDim, lane + 3);
            var to = (float*)(tile + lane);
            for (int d = 0; d < whole; d += Block, to += Block * Width)
            {
                var (v0, v1, v2, v3) = Transpose(
                    Vector128.Load(r0 + d), Vector128.Load(r1 + d), Vector128.Load(r2 + d),
                    Vector128.Load(r3 + d));
                v0.Store(to);
                v1.Store(to + Width);
                v2.Store(to + (2 * Width));
                v3.Store(to + (3 * Width));
            }

            for (int d = whole; d < headDim; d++, to += Width)
                (to[0], to[1], to[2], to[3]) = (r0[d], r1[d], r2[d], r3[d]);
        }

        for (; lane < Width; lane++)
        {
            T* row = lane < rows.Lanes ? rows.Row(data, stride, headDim, lane) : null;
            for (int d = 0; d < headDim; d++)
                tile[((nint)d * Width) + lane] = row is null ? T.Zero : row[d];
        }
    }

    /// <summary>
    /// Each lane's row gets, or has added, factor * tile[d, lane]; 0 for lanes outside from .. to.
    /// </summary>
    private static void Scatter(
        T* tile, T factor, in LaneRows<T> rows, int from, int to, in AttentionTarget<T> target,
        int headDim)
    {
        for (int lane = 0; lane < rows.Lanes; lane++)
        {
            if (HasBlocks && lane >= from && lane + Block <= to)
            {
                ScatterBlocks(tile + lane, factor, rows, lane, target, headDim);
                lane += Block - 1;
                continue;
            }

            bool zero = lane < from || lane >= to;
            if (zero && target.Accumulate) continue;
            T* row = rows.Row(target.Data, target.Stride, headDim, lane);
            for (int d = 0; d < headDim; d++)
            {
                T value = zero ? T.Zero : factor * tile[((nint)d * Width) + lane];
                row[d] = target.Accumulate ? row[d] + value : value;
            }
        }
    }

    /// <summary>Scatter of four lanes; tile points at the first one's column.</summary>
    private static void ScatterBlocks(
        T* tile, T factor, in LaneRows<T> rows, int lane, in AttentionTarget<T> target, int headDim)
    {
        var r0 = (float*)rows.Row(target.Data, target.Stride, headDim, lane);
        var r1 = (float*)rows.Row(target.Data, target.Stride, headDim, lane + 1);
        var r2 = (float*)rows.Row(target.Data, target.Stride, headDim, lane + 2);
        var r3 = (float*)rows.Row(target.Data, target.Stride, headDim, lane + 3);
        var from = (float*)tile;
        float scale = float.CreateTruncating(factor);
        bool add = target.Accumulate;
        int d = 0;
        for (; d + Block <= headDim; d += Block, from += Block * Width)
        {
            var (v0, v1, v2, v3) = Transpose(
                Vector128.Load(from), Vector128.Load(from + Width),
                Vector128.Load(from + (2 * Width)), Vector128.Load(from + (3 * Width)));
            Put(r0 + d, v0 * scale, add);
            Put(r1 + d, v1 * scale, add);
            Put(r2 + d, v2 * scale, add);
            Put(r3 + d, v3 * scale, add);
        }

        for (; d < headDim; d++, from += Width)
        {
            r0[d] = (from[0] * scale) + (add ? r0[d] : 0);
            r1[d] = (from[1] * scale) + (add ? r1[d] : 0);
            r2[d] = (from[2] * scale) + (add ? r2[d] : 0);
            r3[d] = (from[3] * scale) + (add ? r3[d] : 0);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Put(float* target, Vector128<float> value, bool add) =>
        (add ? value + Vector128.Load(target) : value).Store(target);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static (Vector128<float>, Vector128<float>, Vector128<float>, Vector128<float>)
        Transpose(
            Vector128<float> a, Vector128<float> b, Vector128<float> c, Vector128<float> d)
    {
        var abLow = Sse.UnpackLow(a, b);
        var abHigh = Sse.UnpackHigh(a, b);
        var cdLow = Sse.UnpackLow(c, d);
        var cdHigh = Sse.UnpackHigh(c, d);
        return (
            Sse.MoveLowToHigh(abLow, cdLow), Sse.MoveHighToLow(cdLow, abLow),
            Sse.MoveLowToHigh(abHigh, cdHigh), Sse.MoveHighToLow(cdHigh, abHigh));
    }
}
