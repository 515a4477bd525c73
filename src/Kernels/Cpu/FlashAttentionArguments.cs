using System.Numerics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Operands of attention over packed sequences: q and o [tokens, heads, headDim], k and v
/// [keyTokens, kvHeads, headDim], lse [tokens, heads]. Heads lie next to each other; a token's row
/// may be part of a longer one (a fused qkv buffer), so each has its distance between tokens in
/// elements.
/// </summary>
public unsafe struct AttentionArguments<T>
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    public required T* Q { get; init; }

    public required T* K { get; init; }

    public required T* V { get; init; }

    /// <summary>Output of forward, input of backward.</summary>
    public required T* O { get; init; }

    /// <summary>
    /// ln(sum exp(logits)) per query and head; output of forward, input of backward.
    /// </summary>
    public required T* Lse { get; init; }

    public required nint QStride { get; init; }

    public required nint KStride { get; init; }

    public required nint VStride { get; init; }

    public required nint OStride { get; init; }

    public required int Heads { get; init; }

    /// <summary>
    /// Key heads; key head j serves the query heads j * g to j * g + g - 1, g = heads / kvHeads.
    /// </summary>
    public required int KvHeads { get; init; }

    public required int HeadDim { get; init; }

    public required int Sequences { get; init; }

    /// <summary>First query token of each sequence, and the end: [sequences + 1].</summary>
    public required int* CuSeqlensQ { get; init; }

    /// <summary>First key token of each sequence, and the end: [sequences + 1].</summary>
    public required int* CuSeqlensK { get; init; }

    /// <summary>
    /// Keys of each sequence that count, [sequences]; the rest are masked. Null: all count.
    /// </summary>
    public int* KeyLengths { get; init; }

    /// <summary>
    /// A query sees the keys up to its own position; the last query of a sequence sees all of its
    /// keys, also where there are more or fewer keys than queries.
    /// </summary>
    public required bool Causal { get; init; }

    /// <summary>
    /// The last query of a sequence sees the keys that count, not all that there is room for.
    /// </summary>
    public bool Cached { get; init; }

    /// <summary>Factor of q . k, above zero; usually headDim^-0.5.</summary>
    public required T Scale { get; init; }

    /// <summary>
    /// Working memory of FlashAttention.ScratchBytes bytes, 64-byte aligned; need not be cleared.
    /// </summary>
    public required byte* Scratch { get; init; }
}

/// <summary>
/// Where a gradient goes, Stride elements from token to token; without Data it is not wanted.
/// </summary>
public unsafe struct AttentionTarget<T>
    where T : unmanaged
{
    public T* Data { get; init; }

    public nint Stride { get; init; }

    /// <summary>Add to what is there instead of overwriting it.</summary>
    public bool Accumulate { get; init; }
}

/// <summary>
/// Operands of the backward pass: dO, laid out like o, and the targets of dq, dk and dv. Keys that
/// no query sees get zero.
/// </summary>
public unsafe struct AttentionGradients<T>
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    public required T* DO { get; init; }

    public required nint DOStride { get; init; }

    public AttentionTarget<T> DQ { get; init; }

    public AttentionTarget<T> DK { get; init; }

    public AttentionTarget<T> DV { get; init; }
}
