namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Which argument held an index outside its table. A kernel cannot throw: it notes the first one,
/// skips it, and the host throws when it next waits for the device.
/// <see cref="KernelConstants"/> brings the numbers to kernels.cu.
/// </summary>
public enum KernelFault
{
    None = 0,
    EmbeddingIds = 1,
    PositionGatherIds = 2,
    RopePositions = 3,
    SplicePositions = 4,
    SpliceRepeated = 5,
    CrossEntropyRows = 6,
    CrossEntropyTargets = 7,
    AttentionQueryStarts = 8,
    AttentionKeyStarts = 9,
    WeightedGatherStarts = 10,
    WeightedGatherIds = 11,
    CacheAppendSlots = 12,
    CausalConvStarts = 20,
    DeltaRuleStarts = 21,
}

/// <summary>What faults say.</summary>
internal static class KernelFaults
{
    /// <summary>The four words a kernel notes, as an exception.</summary>
    public static Exception Describe(ReadOnlySpan<int> words)
    {
        if (!Enum.IsDefined((KernelFault)words[0]) || words[3] < 0)
            return new CudaException(
                $"cuda: the words in which kernels note wrong indices hold {words[0]}, {words[1]}, "
                + $"{words[2]}, {words[3]}, which no kernel writes: the card's memory or its "
                + "driver is damaged, or something wrote past its end");
        var (position, value, limit) = (words[1], words[2], words[3]);
        string range = $"{value}, expected 0 to {limit - 1}";
        return new ShapeException((KernelFault)words[0] switch
        {
            KernelFault.EmbeddingIds => $"embedding: ids[{position}] is {range}",
            KernelFault.PositionGatherIds => $"position_gather: ids[{position}] is {range}",
            KernelFault.RopePositions => $"rope: positions[{position}] is {range}",
            KernelFault.SplicePositions => $"splice: positions[{position}] is {range}",
            KernelFault.SpliceRepeated =>
                $"splice: positions[{position}] is {value}, as is another",
            KernelFault.CrossEntropyRows =>
                $"cross_entropy: rows[{position}] is {value}, expected rising rows of h below "
                    + $"{limit}",
            KernelFault.CrossEntropyTargets => $"cross_entropy: targets[{position}] is {range}",
            KernelFault.AttentionQueryStarts =>
                Starts("attention: cu_seqlens_q", position, value, limit),
            KernelFault.AttentionKeyStarts =>
                Starts("attention: cu_seqlens_k", position, value, limit),
            KernelFault.CausalConvStarts =>
                Starts("causal_conv: cu_seqlens", position, value, limit),
            KernelFault.DeltaRuleStarts =>
                Starts("delta_rule: cu_seqlens", position, value, limit),
            KernelFault.WeightedGatherStarts =>
                $"weighted_gather: starts[{position}] is {value}, expected to rise from 0 to "
                + $"{limit}, the ids",
            KernelFault.WeightedGatherIds => $"weighted_gather: ids[{position}] is {range}",
            KernelFault.CacheAppendSlots =>
                $"cache_append: slots[{position}] is {value}, expected rising rows of the cache "
                + $"below {limit}",
            var other => $"a kernel reported {other} at {position}: {range}",
        });
    }

    private static string Starts(string name, int position, int value, int end) =>
        $"{name}[{position}] is {value}, expected to rise from 0 to {end}, the tokens";
}
