namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// What weights are unpacked to, where it is written once for several products: as many as the
/// room for them takes stay as long as the device; of others those of a layer, from its second
/// forward, in backward, to the products of its gradients.
/// </summary>
internal sealed class UnpackedWeights : IDisposable
{
    // Of every tensor in a device's memory.
    private const long Alignment = 256;

    private readonly Dictionary<Weight, Tensor> _held = [], _again = [];
    private readonly HashSet<Weight> _wanted = [];
    private DeviceSlab? _room;
    private ITensorPool? _pool;
    private long _bytes;
    private bool _isAgain;

    /// <summary>Whether gradients are computed: what they ask for is not asked for again in this
    /// pass.</summary>
    public bool InBackward { get; set; }

    /// <summary>Most bytes ever kept of a layer.</summary>
    public long Most { get; private set; }

    /// <summary>Bytes of room that all would take that backward asked for.</summary>
    public long Wanted { get; private set; }

    /// <summary>Bytes of the room that are taken.</summary>
    public long Held { get; private set; }

    /// <summary>Bytes of room.</summary>
    public long Room => _room?.Bytes ?? 0;

    /// <summary>Holds nothing any more, and makes other room; null for none.</summary>
    public void Hold(DeviceSlab? room)
    {
        _room?.Dispose();
        _held.Clear();
        (_room, Held) = (room, 0);
    }

    /// <summary>A layer runs again. Keeps its weights in memory of a pool; null keeps
    /// none.</summary>
    public void Begin(ITensorPool? pool) =>
        (_pool, _bytes, _isAgain, InBackward) = (pool, 0, true, false);

    /// <summary>Where it lies, or is to be unpacked to; null where it is not kept.</summary>
    public Tensor? Of(Weight weight, Spec spec, out bool isThere)
    {
        isThere = _held.TryGetValue(weight, out Tensor kept)
            || _again.TryGetValue(weight, out kept);
        if (isThere) return kept;
        if (!InBackward && !_isAgain) return null;
        long bytes = (spec.Bytes + Alignment - 1) / Alignment * Alignment;
        if (_wanted.Add(weight)) Wanted += bytes;
        if (bytes <= Room - Held)
        {
            kept = new Tensor((nint)_room!.Address + (nint)Held, spec);
            Held += bytes;
            return _held[weight] = kept;
        }

        if (_pool is null || InBackward) return null;
        Most = Math.Max(Most, _bytes += spec.Bytes);
        return _again[weight] = _pool.Take(spec);
    }

    public void End()
    {
        foreach (Tensor kept in _again.Values) _pool!.Return(kept);
        _again.Clear();
        (_pool, _isAgain) = (null, false);
    }

    public void Dispose() => Hold(null);
}
