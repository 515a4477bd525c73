namespace MiniCpmNative.Kernels;

/// <summary>
/// The tensors of one block of a model that lie in host memory and come to the device when the
/// block runs: frozen ones, and trained ones with their gradients, which go back. They have their
/// places on the device from the beginning, so that no operation and no kind of weight knows: what
/// is there is right between Acquire and Release only.
/// </summary>
public abstract class StreamedBlock
{
    /// <summary>All of its tensors have been made and written.</summary>
    public abstract void End();

    /// <summary>
    /// Operations on its tensors follow. Blocks run one after the other, in the order in which
    /// they were made or in reverse.
    /// </summary>
    /// <param name="backward">Whether gradients of trained ones are written or added to.</param>
    public abstract void Acquire(bool backward);

    /// <summary>They have been called, once for each Acquire, also when one threw.</summary>
    public abstract void Release();
}
