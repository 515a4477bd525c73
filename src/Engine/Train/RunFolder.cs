using System.Globalization;
using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The output folder of a run and the checkpoints in it, kept from other runs until it is disposed.
/// A checkpoint is made under its name plus <see cref="Unfinished"/> and renamed when it is whole,
/// and gets that ending back before it is removed, so that a folder called checkpoint-N is always
/// whole. What a run overwrites goes when its own first checkpoint stands, or its result.
/// </summary>
public sealed class RunFolder : IDisposable
{
    public const string Unfinished = ".tmp";

    private const string Prefix = "checkpoint-";

    // Old checkpoints have it for the moment in which the new one takes its name.
    private const string SetAside = ".old" + Unfinished;

    // Locked while a run writes here; a killed run leaves the file, but not the lock.
    private const string ClaimName = "running" + Unfinished;

    // "Would block" of Linux and of macOS, what an IOException says
    // of a file that another has locked.
    private const int LinuxWouldBlock = 11, MacWouldBlock = 35;

    private readonly string _folder;
    private readonly Stack<string> _made = [];
    private IReadOnlyList<string> _oldCheckpoints = [], _oldResults = [];
    private FileStream? _claim;
    private RunInputs? _inputs;

    private RunFolder(string folder) => _folder = folder;

    /// <summary>The checkpoint folder to go on from, or null to start anew.</summary>
    public string? ResumeFrom { get; private set; }

    /// <summary>
    /// Makes the folder ready for a run, and removes what killed runs left unfinished. Refused are
    /// a folder with results, unless the run resumes or overwrites; one in which the run would
    /// remove or replace what it reads; and one that it cannot write its logs to.
    /// </summary>
    /// <exception cref="InputException">
    /// As above, another run is writing to it, or there is no checkpoint to go on from.
    /// </exception>
    public static RunFolder Open(TrainArguments arguments)
    {
        string path = arguments.OutputDir;
        var folder = new RunFolder(path);
        try
        {
            if (File.Exists(path)) throw new InputException($"output_dir {path} is a file");
            folder.Make();
            folder._claim = Claim(path);
            folder.Prepare(arguments);
            return folder;
        }
        catch (Exception failure)
        {
            folder.Dispose();
            if (failure is not (IOException or UnauthorizedAccessException)) throw;
            throw new InputException(
                $"output_dir {path} cannot be used: {Messages.OneLine(failure.Message)}", failure);
        }
    }

    /// <summary>Whole checkpoints, oldest step first.</summary>
    public static IReadOnlyList<(int Step, string Path)> Checkpoints(string folder) =>
        Numbered(folder, "");

    /// <summary>The final path of the checkpoint after a step.</summary>
    public static string Checkpoint(string folder, int step) =>
        Path.Combine(folder, $"{Prefix}{step}");

    /// <summary>
    /// Keeps the newest checkpoints, with the best one always the newest, and removes the others;
    /// null keeps all.
    /// </summary>
    public static void Rotate(string folder, int? keep, int? best = null)
    {
        var all = Checkpoints(folder);
        if (keep is not { } most) return;
        var others = all.Where(checkpoint => checkpoint.Step != best).ToList();
        int least = all.Count > 0 && all[^1].Step == best ? 0 : 1;
        int kept = Math.Max(most - (all.Count - others.Count), least);
        for (int i = 0; i < others.Count - kept; i++) Remove(others[i].Path);
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

    /// <summary>Refuses pictures in a checkpoint that this run removes.</summary>
    /// <exception cref="InputException">Names the picture.</exception>
    public void MustKeep(IEnumerable<string> pictures) => _inputs!.MustKeep(pictures);

    /// <summary>
    /// Gives a checkpoint that is whole its name; the first one takes the place of what is
    /// overwritten. Killed at any point, the folder has the old checkpoints or the new one.
    /// </summary>
    public void Place(string unfinished, string checkpoint)
    {
        try
        {
            // Each is on the disk before the next: without power in between, the folder is as if
            // the run had been killed there.
            Disk.Flush(_folder);
            foreach (string old in _oldCheckpoints) Disk.Rename(old, old + SetAside);
            if (_oldCheckpoints.Count > 0) Disk.Flush(_folder);
            Disk.Rename(unfinished, checkpoint);
            Disk.Flush(_folder);
        }
        catch
        {
            Restore();
            throw;
        }

        foreach (string old in _oldCheckpoints) Disk.Remove(old + SetAside);
        foreach (string old in _oldResults) Disk.Remove(old);
        // Before the next checkpoint is begun, beside which they would be put back.
        if (_oldCheckpoints.Count > 0) Disk.Flush(_folder);
        (_oldCheckpoints, _oldResults) = ([], []);
    }

    /// <summary>Removes what is overwritten by a result that now stands.</summary>
    /// <param name="written">Names of the result's files.</param>
    public void Finish(IReadOnlyCollection<string> written)
    {
        foreach (string old in _oldCheckpoints) Remove(old);
        foreach (string old in _oldResults)
            if (!written.Contains(Path.GetFileName(old))) Disk.Remove(old);
        (_oldCheckpoints, _oldResults) = ([], []);
    }

    /// <summary>Lets other runs in; a folder made for a run that wrote nothing goes.</summary>
    public void Dispose()
    {
        _claim?.Dispose();
        try
        {
            while (_made.TryPop(out string? made)) Directory.Delete(made);
        }
        catch (Exception used) when (used is IOException or UnauthorizedAccessException)
        {
            // It is not empty.
        }
    }

    private void Make()
    {
        var missing = new Stack<string>();
        for (string? at = Path.GetFullPath(_folder); at is not null && !Directory.Exists(at);
            at = Path.GetDirectoryName(at)) missing.Push(at);
        while (missing.TryPop(out string? folder))
        {
            Directory.CreateDirectory(folder);
            _made.Push(folder);
        }
    }

    private void Prepare(TrainArguments arguments)
    {
        Restore();
        ResumeFrom = ResumeFolder(arguments);
        if (ResumeFrom is null && !arguments.OverwriteOutputDir && FirstResult(_folder) is { } name)
            throw new InputException(
                $"output_dir {_folder} is not empty (it has {name}): choose another, "
                + "set resume_from_checkpoint to true, or overwrite_output_dir to true");
        if (ResumeFrom is null)
        {
            _oldCheckpoints = [.. Checkpoints(_folder).Select(c => c.Path)];
            _oldResults = [.. ResultFiles.In(_folder)];
        }

        _inputs = new RunInputs(arguments, [.. Removed(arguments)], _oldResults);
        _inputs.Check();
        MustNotBeInTheWay(arguments);
        RunPlaces.MustBeWritable(arguments);
        foreach (string left in Directory.GetDirectories(_folder, Prefix + "*" + Unfinished))
            if (IsNumbered(left, Unfinished) || IsNumbered(left, SetAside))
                Disk.Remove(left);
        AtomicFile.RemoveLeftovers(_folder, ResultFiles.IsWritten);
    }

    // Found at the end otherwise, when no result can take its name.
    private void MustNotBeInTheWay(TrainArguments arguments)
    {
        foreach (string path in Directory.EnumerateFileSystemEntries(_folder))
        {
            bool isFolder = Directory.Exists(path);
            if (isFolder ? ResultFiles.IsWrittenBy(arguments, Path.GetFileName(path))
                : IsNumbered(path, ""))
                throw new InputException($"output_dir: {path} is a "
                    + $"{(isFolder ? "folder" : "file")} "
                    + $"where this run writes a {(isFolder ? "file" : "checkpoint")}: move it "
                    + "away");
        }
    }

    private IEnumerable<string> Removed(TrainArguments arguments) =>
        Directory.GetDirectories(_folder, Prefix + "*")
            .Where(path => IsNumbered(path, Unfinished) || IsNumbered(path, SetAside)
                || (IsNumbered(path, "")
                    && (ResumeFrom is null || arguments.SaveTotalLimit is not null)));

    // The rename of a new checkpoint decides: while it is unfinished, the old ones stand.
    private void Restore()
    {
        if (Numbered(_folder, Unfinished).Count == 0) return;
        foreach (var (_, path) in Numbered(_folder, SetAside))
        {
            string name = path[..^SetAside.Length];
            if (!Directory.Exists(name)) Disk.Rename(path, name);
        }
    }

    private static List<(int Step, string Path)> Numbered(string folder, string ending)
    {
        if (!Directory.Exists(folder)) return [];
        List<(int Step, string Path)> found = [.. Directory
            .GetDirectories(folder, Prefix + "*" + ending).Where(path => IsNumbered(path, ending))
            .Select(path => (int.Parse(Number(path, ending), CultureInfo.InvariantCulture), path))];
        found.Sort();
        return found;
    }

    private static bool IsNumbered(string path, string ending) =>
        path.EndsWith(ending, StringComparison.Ordinal)
        && Path.GetFileName(path).StartsWith(Prefix, StringComparison.Ordinal)
        && int.TryParse(
            Number(path, ending), NumberStyles.None, CultureInfo.InvariantCulture, out _);

    private static string Number(string path, string ending) =>
        Path.GetFileName(path)[Prefix.Length..^ending.Length];

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
                $"output_dir {folder}: another run is writing to it; wait for its end, or choose "
                    + "another",
                failure);
        }
    }

    private static void Remove(string checkpoint)
    {
        string removed = checkpoint + Unfinished;
        if (Directory.Exists(removed)) Disk.Remove(removed);
        Disk.Rename(checkpoint, removed);
        // The name goes before what is in it: what is called checkpoint-N is whole.
        Disk.Flush(Path.GetDirectoryName(Path.GetFullPath(checkpoint))!);
        Disk.Remove(removed);
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
                    + $"has {Path.GetFileName(all[^1].Path)}; remove what is not to be gone on "
                    + "from, or choose another output_dir");
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
