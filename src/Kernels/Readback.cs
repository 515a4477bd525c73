namespace MiniCpmNative.Kernels;

/// <summary>
/// Small results on their way from a device to the host. Start queues copies behind the device's
/// work and returns; Wait gives them when they are there. One set is under way at a time.
/// </summary>
public abstract class Readback
{
    /// <summary>
    /// Queues copies of these tensors as they are when all work queued before is done; they come to
    /// lie one behind the other.
    /// </summary>
    public abstract void Start(params ReadOnlySpan<Tensor> tensors);

    /// <summary>Whether what was started last is there; Wait then returns at once.</summary>
    public abstract bool IsReady { get; }

    /// <summary>The bytes of what was started last, valid until the next start.</summary>
    /// <exception cref="ShapeException">A kernel met a wrong index in the work before.</exception>
    public abstract ReadOnlySpan<byte> Wait();
}
