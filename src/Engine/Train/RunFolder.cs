using System.Globalization;
using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The output folder of a run and the checkpoints in it. A checkpoint is made under its name plus
/// <see cref="Unfinished"/> and renamed when it is whole, and gets that ending back before it is
/// removed, so that a folder called checkpoint-N is always whole.
/// </summary>
public static class RunFolder
{
    public const string Unfinished = ".tmp";

    private const string Prefix = "checkpoint-";

    // Locked while a run writes here; a killed run leaves the file, but not the lock.
    private const string ClaimName = "running" + Unfinished;

    // "Would block" of Linux and of macOS, what an IOException says
    // of a file that another has locked.
    private const int LinuxWouldBlock = 11, MacWouldBlock = 35;

    /// <summary>
    /// Makes the folder ready for a run: refuses one that holds results, unless the run resumes or
    /// overwrites (checkpoints and trainer_state.json are then removed); removes unfinished
    /// checkpoints.
    /// </summary>
    /// <param name="arguments">The run's configuration.</param>
    /// <param name="claim">Keeps other runs out of the folder until it is disposed.</param>
    /// <returns>The checkpoint folder to go on from, or null to start anew.</returns>
    /// <exception cref="InputException">
    /// A used folder, one that another run is writing to, or no checkpoint to go on from.
    /// </exception>
    public static string? Prepare(TrainArguments arguments, out IDisposable claim)
    {
        string folder = arguments.OutputDir;
        FileStream? claimed = null;
        try
        {
            if (File.Exists(folder)) throw new InputException($"output_dir {folder} is a file");
            string? resume = ResumeFolder(arguments);
            if (resume is null && !arguments.OverwriteOutputDir && FirstResult(folder) is { } name)
            {
                throw new InputException(
                    $"output_dir {folder} is not empty (it has {name}): choose another, "
                    + "set resume_from_checkpoint to true, or overwrite_output_dir to true");
            }

            Directory.CreateDirectory(folder);
            claimed = Claim(folder);
            foreach (string left in Directory.GetDirectories(folder, Prefix + "*" + Unfinished))
                Directory.Delete(left, recursive: true);
            if (resume is null)
            {
                foreach (var (_, path) in Checkpoints(folder)) Remove(path);
                File.Delete(Path.Combine(folder, LogState.FileName));
            }

            claim = claimed;
            return resume;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            claimed?.Dispose();
            throw new InputException(
                $"output_dir {folder} cannot be used: {Messages.OneLine(failure.Message)}",
                failure);
        }
    }

    /// <summary>Whole checkpoints, oldest step first.</summary>
    public static IReadOnlyList<(int Step, string Path)> Checkpoints(string folder)
    {
        if (!Directory.Exists(folder)) return [];
        var found = new List<(int Step, string Path)>();
        foreach (string path in Directory.GetDirectories(folder, Prefix + "*"))
        {
            string number = Path.GetFileName(path)[Prefix.Length..];
            if (int.TryParse(number, NumberStyles.None, CultureInfo.InvariantCulture, out int step))
                found.Add((step, path));
        }

        found.Sort();
        return found;
    }

    /// <summary>The final path of the checkpoint after a step.</summary>
    public static string Checkpoint(string folder, int step) =>
        Path.Combine(folder, $"{Prefix}{step}");

    /// <summary>Keeps the newest checkpoints and removes the others; null keeps all.</summary>
    public static void Rotate(string folder, int? keep)
    {
        var all = Checkpoints(folder);
        for (int i = 0; i < all.Count - (keep ?? all.Count); i++) Remove(all[i].Path);
    }

    /// <summary>
    /// Removes a checkpoint that could not be finished, so that it takes no space.
    /// </summary>
    public static void RemoveUnfinished(string checkpoint)
    {
        try
        {
            if (Directory.Exists(checkpoint)) Directory.Delete(checkpoint, recursive: true);
        }
        catch (Exception ignored) when (ignored is IOException or UnauthorizedAccessException)
        {
            // What made it fail says more; the next run in this folder removes it.
        }
    }

    private static FileStream Claim(string folder)
    {
        try
        {
            return new FileStream(
                Path.Combine(folder, ClaimName), FileMode.OpenOrCreate, FileAccess.ReadWrite,
                FileShare.None, bufferSize: 1, FileOptions.DeleteOnClose);
        }
        catch (IOException failure) when (failure.HResult is LinuxWouldBlock or MacWouldBlock)
        {
            throw new InputException(
                $"output_dir {folder}: another run is writing to it; wait for its end, or choose another",
                failure);
        }
    }

    private static void Remove(string checkpoint)
    {
        string removed = checkpoint + Unfinished;
        if (Directory.Exists(removed)) Directory.Delete(removed, recursive: true);
        Directory.Move(checkpoint, removed);
        Directory.Delete(removed, recursive: true);
    }

    private static string? ResumeFolder(TrainArguments arguments)
    {
        if (arguments.ResumeFromCheckpoint is not { } point) return null;
        var all = Checkpoints(arguments.OutputDir);
        if (point.Path is { } path)
        {
            if (!Directory.Exists(path))
                throw new InputException($"resume_from_checkpoint {path}: there is no such folder");
            // The run would meet later checkpoints again, and take them for its own.
            if (all.Count > 0 && FullPath(all[^1].Path) != FullPath(path))
                throw new InputException(
                    $"resume_from_checkpoint {path}: output_dir {arguments.OutputDir} "
                    + $"has {Path.GetFileName(all[^1].Path)}; remove what is not to be gone on from, or "
                    + "choose another output_dir");
            return path;
        }

        return all.Count > 0
            ? all[^1].Path
            : throw new InputException($"resume_from_checkpoint is true, but output_dir "
                + $"{arguments.OutputDir} has no checkpoint");
    }

    private static string FullPath(string folder) =>
        Path.TrimEndingDirectorySeparator(Path.GetFullPath(folder));

    // Logs and the configuration alone, as a run leaves that failed before its first checkpoint, do
    // not count as results.
    private static string? FirstResult(string folder)
    {
        if (!Directory.Exists(folder)) return null;
        foreach (string path in Directory.EnumerateFileSystemEntries(folder).Order())
        {
            string name = Path.GetFileName(path);
            bool isLog = name is TrainWriter.FileName or LogLines.FileName or "runs"
                || name.StartsWith("events.out.tfevents.", StringComparison.Ordinal)
                || name.EndsWith(Unfinished, StringComparison.Ordinal);
            if (!isLog) return name;
        }

        return null;
    }
}
