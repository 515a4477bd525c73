namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// What the weights of a layer are unpacked to, from its second forward, in backward, to the
/// products of its gradients: the unpacked matrix is written once for both.
/// </summary>
internal sealed class UnpackedWeights
{
    private readonly Dictionary<Weight, Tensor> _there = [];
    private ITensorPool? _pool;
    private long _bytes;

    /// <summary>Whether gradients are computed: what they ask for is not asked for again.</summary>
    public bool InBackward { get; set; }

    /// <summary>Most bytes ever kept of a layer.</summary>
    public long Most { get; private set; }

    /// <summary>Keeps them in memory of a pool; null keeps none.</summary>
    public void Begin(ITensorPool? pool) => (_pool, _bytes, InBackward) = (pool, 0, false);

    /// <summary>Where it lies, or is to be unpacked to; null where it is not kept.</summary>
    public Tensor? Of(Weight weight, Spec spec, out bool isThere)
    {
        if (isThere = _there.TryGetValue(weight, out Tensor kept)) return kept;
        if (_pool is null || InBackward) return null;
        Most = Math.Max(Most, _bytes += spec.Bytes);
        return _there[weight] = _pool.Take(spec);
    }

    public void End()
    {
        foreach (Tensor kept in _there.Values) _pool!.Return(kept);
        _there.Clear();
        _pool = null;
    }
}
