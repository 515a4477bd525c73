namespace MiniCpmNative.Engine.Train;

/// <summary>Why a run should end early; the value is the exit code.</summary>
public enum StopReason
{
    None = 0, Hangup = 129, Interrupt = 130, Quit = 131, Terminate = 143, ProcessorTime = 152,
}

/// <summary>
/// Asks a run to finish its step, save and return, or to save and go on; set from a signal handler,
/// read between steps.
/// </summary>
public sealed class StopRequest
{
    private int _reason, _checkpoint;
    private volatile bool _isTraining;

    public StopReason Reason => (StopReason)Volatile.Read(ref _reason);

    public bool Requested => Reason != StopReason.None;

    /// <summary>
    /// Whether there may be something to save. Before, a run loses nothing when it ends at once.
    /// </summary>
    public bool IsTraining
    {
        get => _isTraining;
        set => _isTraining = value;
    }

    /// <summary>Asks for a checkpoint at the next chance.</summary>
    public void RequestCheckpoint() => Volatile.Write(ref _checkpoint, 1);

    /// <summary>Whether a checkpoint was asked for since the last call.</summary>
    public bool TakeCheckpoint() => Interlocked.Exchange(ref _checkpoint, 0) != 0;

    /// <summary>False when a stop had been requested before.</summary>
    public bool TryRequest(StopReason reason) =>
        Interlocked.CompareExchange(ref _reason, (int)reason, 0) == 0;
}
