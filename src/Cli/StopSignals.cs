using System.Runtime.InteropServices;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>
/// Ctrl-C and SIGTERM ask the run to finish its step and save. A second one ends the process at
/// once: it is left to the system's default handler.
/// </summary>
internal sealed class StopSignals : IDisposable
{
    private readonly PosixSignalRegistration _interrupt, _terminate;

    /// <param name="stop">Receives the request.</param>
    /// <param name="said">Called once with a line that says what happens now.</param>
    public StopSignals(StopRequest stop, Action<string> said)
    {
        void Handle(PosixSignalContext context, StopReason reason, string name)
        {
            context.Cancel = stop.TryRequest(reason);
            if (context.Cancel)
                said($"{name}: finishing this step, then saving (once more ends at once)");
        }

        _interrupt = PosixSignalRegistration.Create(
            PosixSignal.SIGINT, c => Handle(c, StopReason.Interrupt, "Ctrl-C"));
        _terminate = PosixSignalRegistration.Create(
            PosixSignal.SIGTERM, c => Handle(c, StopReason.Terminate, "SIGTERM"));
    }

    public void Dispose()
    {
        _interrupt.Dispose();
        _terminate.Dispose();
    }
}
