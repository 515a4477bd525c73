namespace MiniCpmNative.Kernels.Cuda;

/// <content>What quantised weights are unpacked to, and how long it stays.</content>
public sealed unsafe partial class CudaDevice
{
    private readonly UnpackedWeights _unpacked = new();

    /// <summary>
    /// Whether a layer that runs again in backward unpacks its weights once for both: less time,
    /// and the memory of what a layer's weights are unpacked to.
    /// </summary>
    public bool KeepsUnpacked { get; set; }

    /// <summary>Most bytes that a layer kept so.</summary>
    public long UnpackedBytes => _unpacked.Most;

    /// <summary>Bytes of memory that <see cref="HoldUnpacked"/> gave to unpacked weights.</summary>
    public long UnpackedRoom => _unpacked.Room;

    /// <summary>Bytes of it that are taken.</summary>
    public long UnpackedHeld => _unpacked.Held;

    /// <summary>Bytes that all weights would take that backward unpacked so far.</summary>
    public long UnpackedWanted => _unpacked.Wanted;

    /// <summary>
    /// Gives memory to weights that stay unpacked, in the order in which backward asks for them;
    /// what stayed so before does not any more.
    /// </summary>
    /// <exception cref="DeviceMemoryException">There are not so many bytes.</exception>
    public void HoldUnpacked(long bytes)
    {
        Stream.Synchronise();
        _unpacked.Hold(null);
        if (bytes > 0) _unpacked.Hold(new DeviceSlab(Context, bytes));
    }

    public override void BeginAgain(ITensorPool pool) =>
        _unpacked.Begin(KeepsUnpacked ? pool : null);

    public override void EndAgain() => _unpacked.End();

    /// <summary>Room for what a weight is unpacked to, and whether it is there already; it lives
    /// at least until the scratch of the running operation ends.</summary>
    internal Tensor Unpacked(Weight weight, Spec spec, string name, out bool isThere) =>
        _unpacked.Of(weight, spec, out isThere) ?? Step.Push(spec, name);
}
