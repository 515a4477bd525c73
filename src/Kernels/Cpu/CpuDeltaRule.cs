using System.Numerics;
using System.Runtime.Intrinsics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// The delta rule on the CPU: a thread takes a value head of a sequence from the first chunk to the
/// last; for gradients a key head with the value heads that it serves, and back again from the
/// states at the chunks' starts, which are computed anew. Every element has one owner that sums in
/// a fixed order.
/// </summary>
internal static class CpuDeltaRule
{
    public static void Forward<T>(in CpuCall<T> call, DeltaHeads<T> heads)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (Vector512.IsHardwareAccelerated)
            DeltaForward<Lanes512<T>, Vector512<T>, T>.Run(call, heads);
        else
            DeltaForward<Lanes256<T>, Vector256<T>, T>.Run(call, heads);
    }

    public static void Backward<T>(in CpuCall<T> call, DeltaHeads<T> heads)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (Vector512.IsHardwareAccelerated)
            DeltaBackward<Lanes512<T>, Vector512<T>, T>.Run(call, heads);
        else
            DeltaBackward<Lanes256<T>, Vector256<T>, T>.Run(call, heads);
    }
}

/// <summary>o, and the states after the sequences where they are kept.</summary>
internal readonly unsafe struct DeltaForward<TLanes, TVector, T>(
    DeltaHeads<T> heads, Matrix<T> scratch, Matrix<T> output) : IRangeBody
    where TLanes : struct, ILanes<TVector, T>
    where TVector : struct
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    private const int Tokens = DeltaChunk<TLanes, TVector, T>.Tokens;

    public static void Run(in CpuCall<T> call, DeltaHeads<T> heads)
    {
        int keys = DeltaChunk<TLanes, TVector, T>.Padded(heads.KeyDim);
        int values = DeltaChunk<TLanes, TVector, T>.Padded(heads.ValueDim);
        int elements = DeltaChunk<TLanes, TVector, T>.Elements(keys, values)
            + (keys * values) + (Tokens * values);
        Matrix<T> scratch = call.Scratch(new Shape(call.Workers.Count, elements));
        call.Workers.For(((int)heads.Starts.Count - 1) * heads.ValueHeads,
            new DeltaForward<TLanes, TVector, T>(heads, scratch, call.Output));
    }

    public void Run(int begin, int end, int worker)
    {
        int keys = DeltaChunk<TLanes, TVector, T>.Padded(heads.KeyDim);
        int values = DeltaChunk<TLanes, TVector, T>.Padded(heads.ValueDim);
        T* memory = scratch.Row(worker);
        T* state = DeltaChunk<TLanes, TVector, T>.Take(ref memory, keys * values);
        T* result = DeltaChunk<TLanes, TVector, T>.Take(ref memory, Tokens * values);
        var chunk = new DeltaChunk<TLanes, TVector, T>(memory, keys, values);
        for (int item = begin; item < end; item++)
        {
            int sequence = item / heads.ValueHeads, head = item % heads.ValueHeads;
            Matrix<T> kept = heads.State.Exists
                ? heads.State.Slice(item * heads.KeyDim, heads.KeyDim) : default;
            new Span<T>(state, keys * values).Clear();
            for (int r = 0; r < kept.Rows; r++)
                kept.RowSpan(r).CopyTo(new Span<T>(state + (r * values), heads.ValueDim));
            int last = heads.Starts[sequence + 1];
            for (int first = heads.Starts[sequence]; first < last; first += Tokens)
            {
                chunk.LoadKeys(heads, head / heads.Group, first, Math.Min(Tokens, last - first));
                chunk.LoadValues(heads, head, first);
                chunk.Solve(state);
                chunk.Output(state, result);
                for (int i = 0; i < chunk.Count; i++)
                    new Span<T>(result + (i * values), heads.ValueDim).CopyTo(
                        output.RowSpan(first + i).Slice(head * heads.ValueDim, heads.ValueDim));
                if (kept.Exists || first + Tokens < last) chunk.Advance(state);
            }

            for (int r = 0; r < kept.Rows; r++)
                new Span<T>(state + (r * values), heads.ValueDim).CopyTo(kept.RowSpan(r));
        }
    }
}
