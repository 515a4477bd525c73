namespace MiniCpmNative.Engine.Train;

/// <summary>Why a run should end early; the value is the exit code.</summary>
public enum StopReason { None = 0, Interrupt = 130, Terminate = 143 }

/// <summary>
/// Asks a run to finish its step, save and return; set from a signal handler, read between steps.
/// </summary>
public sealed class StopRequest
{
    private int _reason;

    public StopReason Reason => (StopReason)Volatile.Read(ref _reason);

    public bool Requested => Reason != StopReason.None;

    /// <summary>False when a stop had been requested before.</summary>
    public bool TryRequest(StopReason reason) =>
        Interlocked.CompareExchange(ref _reason, (int)reason, 0) == 0;
}
