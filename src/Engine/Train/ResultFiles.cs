using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Report;
using MiniCpmNative.Engine.Weights;

namespace MiniCpmNative.Engine.Train;

/// <summary>Which files of an output folder a run writes, by their names.</summary>
internal static class ResultFiles
{
    /// <summary>
    /// Endings of the small files that a whole model takes over from the one it started from;
    /// anything else in a model's folder (optimizer states, pictures) is not the model.
    /// </summary>
    private static readonly string[] s_copied = [".json", ".txt", ".model", ".jinja", ".py"];

    /// <summary>Whether a whole model takes the file over, weights not counted.</summary>
    public static bool IsCopied(string name) =>
        s_copied.Contains(Path.GetExtension(name)) && name != Checkpoint.IndexFile;

    /// <summary>Whether the file belongs to a model's tokenizer.</summary>
    public static bool IsTokenizer(string name) => IsCopied(name)
        && (name.StartsWith("token", StringComparison.Ordinal)
            || name.StartsWith("chat_template.", StringComparison.Ordinal)
            || name is "special_tokens_map.json" or "added_tokens.json" or "vocab.json"
                or "merges.txt");

    /// <summary>
    /// Whether the name may be one that a run writes, logs included, or takes from a model's or an
    /// adapter's folder.
    /// </summary>
    public static bool IsWritten(string name) => s_copied.Contains(Path.GetExtension(name))
        || Path.GetExtension(name) is ".safetensors" or ".jsonl" || name == ReportFile.FileName;

    /// <summary>Whether a run writes the name into its output folder.</summary>
    public static bool IsWrittenBy(TrainArguments arguments, string name) =>
        IsLog(name) || (arguments.UseLora
            ? IsAdapter(name) || (IsTokenizer(name)
                && File.Exists(Path.Combine(arguments.ModelNameOrPath!, name)))
            : CheckpointWriter.IsWeights(name) || (IsCopied(name)
                && File.Exists(Path.Combine(arguments.ModelNameOrPath!, name))));

    /// <summary>
    /// What makes a folder a model or an adapter, and its log history: what must not stay beside
    /// another run's result. The user's own files, and copies that do no harm, are not among it.
    /// </summary>
    public static IEnumerable<string> In(string folder) => Directory.EnumerateFiles(folder)
        .Where(path => Path.GetFileName(path) is var name && (name == LogState.FileName
            || IsAdapter(name) || CheckpointWriter.IsWeights(name)
            || (name == "config.json" && IsModel(path))));

    private static bool IsLog(string name) =>
        name is TrainWriter.FileName or LogLines.FileName or LogLines.AnswersName
            or LogState.FileName or ReportFile.FileName;

    private static bool IsAdapter(string name) =>
        name is AdapterFile.WeightsName or AdapterConfig.FileName;

    // Somebody's training configuration may have the name too.
    private static bool IsModel(string path)
    {
        try
        {
            return JsonInput.ReadObject(path).Find("model_type") is not null;
        }
        catch (InputException)
        {
            return false;
        }
    }
}
