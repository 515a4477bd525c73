using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The places a run writes to, asked before anything large is read: whether they can be written,
/// and whether they are large enough.
/// </summary>
internal static class RunPlaces
{
    /// <exception cref="InputException">A log cannot be written.</exception>
    public static void MustBeWritable(TrainArguments arguments)
    {
        string log = Path.Combine(arguments.OutputDir, LogLines.FileName);
        if (File.Exists(log))
        {
            Try(log, () => new FileStream(
                log, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite).Dispose());
        }

        if (arguments.ReportTo == ReportTo.None) return;
        string folder = arguments.LogFolder;
        // Made later: what is there of the path must take a folder or a file.
        string there = Path.GetFullPath(folder);
        for (; !Directory.Exists(there); there = Path.GetDirectoryName(there)!)
            if (File.Exists(there))
                throw new InputException($"logging_dir {folder}: {there} is a file");
        string probe = Path.Combine(there, $"probe.jsonl.{Environment.ProcessId}.tmp");
        Try($"logging_dir {folder}", () => new FileStream(
            probe, FileMode.Create, FileAccess.Write, FileShare.None, bufferSize: 1,
            FileOptions.DeleteOnClose).Dispose());
    }

    /// <summary>
    /// Refuses a run whose first checkpoint and result do not fit on the disk, and tells when the
    /// checkpoints it keeps may not.
    /// </summary>
    /// <param name="arguments">The run's configuration.</param>
    /// <param name="size">What the run saves.</param>
    /// <param name="checkpoints">How many it saves; 1 as long as that is not known.</param>
    /// <param name="free">Free bytes, or null when unknown.</param>
    /// <returns>A line for the user, or null.</returns>
    /// <exception cref="RunException">Not even one fits.</exception>
    public static string? MustHoldCheckpoints(
        TrainArguments arguments, SavedBytes size, long checkpoints, long? free)
    {
        if (free is not { } there) return null;
        bool saves = arguments.SaveStrategy != When.No;
        long one = !saves ? 0 : size.Result + (arguments.SaveOnlyModel ? 0 : size.State);
        string folder = $"output_dir {arguments.OutputDir}";
        if (one + size.Result > there)
            throw new RunException(
                $"{folder}: {(saves ? "one checkpoint and the result take" : "the result takes")} "
                + $"{Gib(one + size.Result)}, {Gib(there)} are free on its disk: make room, or "
                + "choose another output_dir");
        // While the oldest is still there the newest is written.
        long kept = Math.Min(checkpoints, arguments.SaveTotalLimit ?? checkpoints);
        long most = Math.Max(Math.Min(checkpoints, kept + 1) * one, (kept * one) + size.Result);
        return most <= there ? null
            : $"{folder}: {kept:N0} checkpoints of {Gib(one)} and the result take {Gib(most)}, "
                + $"{Gib(there)} are free on its disk: save_total_limit keeps fewer";
    }

    /// <summary>Bytes free for this user on a folder's disk, or null when unknown.</summary>
    public static long? Free(string folder)
    {
        try
        {
            var drive = new DriveInfo(Path.GetFullPath(folder));
            return drive.TotalSize > 0 ? drive.AvailableFreeSpace : null;
        }
        catch (Exception unknown) when (unknown is IOException or UnauthorizedAccessException
            or ArgumentException)
        {
            return null;
        }
    }

    /// <summary>1.5 GiB, or smaller sizes in MiB.</summary>
    public static string Gib(long bytes) => bytes >= 1 << 30
        ? FormattableString.Invariant($"{bytes / (double)(1 << 30):0.0} GiB")
        : FormattableString.Invariant($"{bytes / (double)(1 << 20):0.0} MiB");

    private static void Try(string place, Action write)
    {
        try
        {
            write();
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new InputException(
                $"{place}: cannot be written: {Messages.OneLine(failure.Message)}", failure);
        }
    }
}

/// <summary>Bytes that a run saves: its model or adapter, and the state to go on with.</summary>
public readonly record struct SavedBytes(long Result, long State);
