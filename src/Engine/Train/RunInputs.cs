using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run reads, held against what it removes and replaces in its output folder, links
/// resolved on both sides.
/// </summary>
/// <param name="arguments">The run's configuration.</param>
/// <param name="removed">Checkpoint folders that the run removes.</param>
/// <param name="replaced">Files of an older result that the run removes.</param>
internal sealed class RunInputs(
    TrainArguments arguments, IReadOnlyList<string> removed, IReadOnlyList<string> replaced)
{
    private const int MostLinks = 40;

    private readonly string _folder = RealPath(arguments.OutputDir);
    private readonly Dictionary<string, string> _realFolders = [];

    /// <exception cref="InputException">Names the input and what would become of it.</exception>
    public void Check()
    {
        string model = arguments.ModelNameOrPath!;
        if (RealPath(model) == _folder)
            throw new InputException(
                $"output_dir {arguments.OutputDir} is the folder of model_name_or_path: the run "
                + "would replace the model it starts from; choose another output_dir");
        MustKeepFolder("model_name_or_path", model);
        if (arguments.LoraWeightPath is { } adapter) MustKeepFolder("lora_weight_path", adapter);
        foreach (var (file, _) in DataFiles.Of(arguments.DataPath!)) MustKeep("data_path", file);
        if (arguments.EvalDataPath is { } evaluation)
            foreach (var (file, _) in DataFiles.Of(evaluation)) MustKeep("eval_data_path", file);
    }

    /// <exception cref="InputException">A picture would be removed.</exception>
    public void MustKeep(IEnumerable<string> pictures)
    {
        if (removed.Count == 0) return;
        foreach (string picture in pictures) MustKeep("picture", picture);
    }

    private void MustKeepFolder(string key, string folder)
    {
        MustKeep(key, folder);
        if (!Directory.Exists(folder)) return;
        try
        {
            foreach (string file in Directory.EnumerateFiles(folder))
                if (ResultFiles.IsWritten(Path.GetFileName(file))) MustKeep(key, file);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new InputException(
                $"{key} {folder}: cannot list: {Messages.OneLine(failure.Message)}", failure);
        }
    }

    private void MustKeep(string key, string path)
    {
        string real = RealFile(path);
        foreach (string gone in removed)
        {
            // A link is removed, what it leads to is not.
            string place = Path.Combine(_folder, Path.GetFileName(gone));
            if (new FileInfo(gone).LinkTarget is null && (real == place
                || real.StartsWith(place + "/", StringComparison.Ordinal)))
                throw new InputException(
                    $"{key} {path} is in {gone}, which this run removes: choose another "
                    + "output_dir, or move it out of there first");
        }

        // The log is written in place, through a link.
        bool isLog = real == RealFile(Path.Combine(_folder, LogLines.FileName));
        bool isReplaced = Path.GetDirectoryName(real) == _folder
            && Path.GetFileName(real) is var name
            && (ResultFiles.IsWrittenBy(arguments, name)
                || replaced.Any(file => Path.GetFileName(file) == name));
        if (isLog || isReplaced)
            throw new InputException(
                $"{key} {path} is a file of output_dir {arguments.OutputDir} that this run "
                + "replaces: choose another output_dir");
    }

    // Pictures are many, their folders few.
    private string RealFile(string path)
    {
        string full = Path.GetFullPath(path);
        if (Path.GetDirectoryName(full) is not { } folder) return full;
        if (!_realFolders.TryGetValue(folder, out string? real))
            _realFolders.Add(folder, real = RealPath(folder));
        string file = Path.Combine(real, Path.GetFileName(full));
        return new FileInfo(file).LinkTarget is null ? file : RealPath(file);
    }

    private static string RealPath(string path)
    {
        string full = Path.TrimEndingDirectorySeparator(Path.GetFullPath(path));
        for (int links = 0; links < MostLinks; links++)
            if (FirstLink(full) is { } next) full = next;
            else break;
        return full;
    }

    // The path with its first link replaced by what it leads to, or null.
    private static string? FirstLink(string path)
    {
        for (int end = 1; end > 0 && end <= path.Length;)
        {
            int slash = path.IndexOf('/', end);
            string part = slash < 0 ? path : path[..slash];
            if (new FileInfo(part).LinkTarget is { } target)
            {
                string rest = slash < 0 ? "" : path[(slash + 1)..];
                return Path.TrimEndingDirectorySeparator(
                    Path.GetFullPath(Path.Combine(target, rest), Path.GetDirectoryName(part)!));
            }

            end = slash + 1;
        }

        return null;
    }
}
