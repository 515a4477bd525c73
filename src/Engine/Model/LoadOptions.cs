namespace MiniCpmNative.Engine.Model;

/// <summary>How a checkpoint becomes a model; as it is said here, frozen and dense.</summary>
public sealed record LoadOptions
{
    /// <summary>The trained tensors, on the model's device; null where none are.</summary>
    public ParameterRanges? Trainables { get; init; }

    /// <summary>Adapters that sit on linear layers.</summary>
    public Adapters Adapters { get; init; } = Adapters.None;

    /// <summary>What layers compute again in backward.</summary>
    public Recomputation Recomputation { get; init; } = Recomputation.None;

    /// <summary>Makes frozen weights of linear layers; null keeps them dense.</summary>
    public IWeightKind? Kind { get; init; }

    /// <summary>Weights of which a part stays frozen; null for none.</summary>
    public SplitWeights? Split { get; init; }

    /// <summary>Norms of rows, where somebody else has a use for them too.</summary>
    public FrozenNorms? Norms { get; init; }

    /// <summary>Whether frozen tensors of blocks lie in host memory.</summary>
    public bool Streams { get; init; }

    /// <summary>Frozen tables that are looked up stay there.</summary>
    public bool EmbeddingsInHost { get; init; }
}
