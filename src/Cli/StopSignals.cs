using System.Diagnostics;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Cli;

/// <summary>
/// Ctrl-C, SIGTERM, SIGHUP (a closed terminal, unless it is ignored as under nohup) and SIGQUIT ask
/// the run to finish its step and save, once there is something to save; before that the process
/// ends at once, as it does when one of them comes again. So does SIGXCPU, which a limit of
/// processor time (ulimit -t) sends each second. SIGUSR1 and SIGUSR2 ask for a checkpoint without
/// an end.
/// </summary>
internal sealed partial class StopSignals : IDisposable
{
    // What tells a second order from the first one's echo: timeout(1) and schedulers signal the
    // process and its group, a terminal that closes the shell and its jobs.
    internal const double EchoSeconds = 0.5;

    private readonly StopRequest _stop;
    private readonly Action<string> _said;
    private readonly Lock _turn = new();
    private readonly List<PosixSignalRegistration> _registrations = [];
    private long _first;

    /// <param name="stop">Receives the request.</param>
    /// <param name="said">Called with a line that says what happens now.</param>
    public StopSignals(StopRequest stop, Action<string> said)
    {
        (_stop, _said) = (stop, said);
        On(PosixSignal.SIGINT, c => Stop(c, StopReason.Interrupt, "Ctrl-C"));
        On(PosixSignal.SIGTERM, c => Stop(c, StopReason.Terminate, "SIGTERM"));
        On(PosixSignal.SIGQUIT, c => Stop(c, StopReason.Quit, "SIGQUIT"));
        On(PosixSignal.SIGHUP, c => Stop(c, StopReason.Hangup, "SIGHUP"));
        // .NET has no names for these: raw numbers are of the platform.
        bool isMac = OperatingSystem.IsMacOS();
        if (!isMac && !OperatingSystem.IsLinux()) return;
        On((PosixSignal)(isMac ? 30 : 10), c => Save(c, "SIGUSR1"));
        On((PosixSignal)(isMac ? 31 : 12), c => Save(c, "SIGUSR2"));
        On((PosixSignal)24, c => Stop(c, StopReason.ProcessorTime, "SIGXCPU"));
    }

    public void Dispose()
    {
        foreach (PosixSignalRegistration registration in _registrations) registration.Dispose();
    }

    private void On(PosixSignal signal, Action<PosixSignalContext> handler) =>
        _registrations.Add(PosixSignalRegistration.Create(signal, handler));

    private void Stop(PosixSignalContext context, StopReason reason, string name)
    {
        context.Cancel = true;
        lock (_turn)
        {
            if (!_stop.IsTraining && !_stop.Requested)
            {
                _said($"{name}: ended before the first step, nothing is lost");
                End((int)reason);
            }

            if (_stop.TryRequest(reason))
            {
                _first = Stopwatch.GetTimestamp();
                _said($"{name}: finishing this step, then saving (once more ends at once)");
                return;
            }

            // Whoever closes a terminal does not ask for an end without saving, nor does a limit.
            bool isEcho = Stopwatch.GetElapsedTime(_first).TotalSeconds < EchoSeconds;
            bool isOrder = reason is not (StopReason.Hangup or StopReason.ProcessorTime);
            if (!isEcho && isOrder) End((int)reason);
        }
    }

    private void Save(PosixSignalContext context, string name)
    {
        context.Cancel = true;
        _stop.RequestCheckpoint();
        _said(_stop.IsTraining
            ? $"{name}: saving a checkpoint after this step"
            : $"{name}: saving a checkpoint after the first step");
    }

    // At once: whatever would run at an orderly exit may wait for the thread that is ended here.
    // As process 1 of a container the signal's own default would do nothing.
    [LibraryImport("libc", EntryPoint = "_exit")]
    private static partial void End(int code);
}
