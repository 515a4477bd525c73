using System.Text;
using System.Text.Json;

namespace MiniCpmNative.Engine.Report;

/// <summary>
/// What a run left in its output folder, read for its report: numbers and messages of
/// train_log.jsonl, answers of eval_answers.jsonl, the settings of train_args.json. A file that is
/// torn at its end, as that of a run that goes on, is read as far as it is whole.
///
/// An answer is an entry {"step": 50, "row": 7, "id": "a", "question": "...", "pictures":
/// ["/path"], "expected": "...", "answer": "..."}, of which step, row and answer must be there;
/// those of one row are shown together.
/// </summary>
internal sealed class RunRecord
{
    public const string LogFile = "train_log.jsonl", AnswersFile = "eval_answers.jsonl",
        SettingsFile = "train_args.json";

    private const long MostBytes = 1 << 30;

    private readonly Dictionary<string, List<(double Step, double Value)>> _series =
        new(StringComparer.Ordinal);

    private RunRecord(string folder)
    {
        string full = Path.TrimEndingDirectorySeparator(Path.GetFullPath(folder));
        Name = Path.GetFileName(full) is { Length: > 0 } name ? name : full;
    }

    /// <summary>The folder's name.</summary>
    public string Name { get; set; }

    /// <summary>Names of all numbers, in the order in which they first came.</summary>
    public IEnumerable<string> Names => _series.Keys;

    public List<(int Step, string Text)> Messages { get; } = [];

    public List<SampleAnswer> Samples { get; } = [];

    public List<(string Key, string Value)> Settings { get; } = [];

    /// <exception cref="InputException">The folder is not that of a run.</exception>
    public static RunRecord Read(string folder)
    {
        string log = Path.Combine(folder, LogFile);
        if (!File.Exists(log))
            throw new InputException(
                $"{folder}: has no {LogFile}, expected the output_dir of a run");
        var record = new RunRecord(folder);
        Lines(log, record.Take);
        Lines(Path.Combine(folder, AnswersFile),
            entry => record.Samples.Add(SampleAnswer.Read(entry)));
        string settings = Path.Combine(folder, SettingsFile);
        if (!File.Exists(settings)) return record;
        foreach (var (key, value) in JsonInput.ReadObject(settings).Members())
            record.Settings.Add((key, value.IsText ? value.Text() : value.Element.GetRawText()));
        return record;
    }

    /// <summary>A number by step; empty where the run has none of that name.</summary>
    public IReadOnlyList<(double Step, double Value)> Series(string name) =>
        _series.GetValueOrDefault(name) ?? [];

    /// <summary>The last number of a name, or NaN.</summary>
    public double Last(string name) => Series(name) is [.., var last] ? last.Value : double.NaN;

    public string? Setting(string key) => Settings.Find(s => s.Key == key).Value;

    // Up to the first line that is none.
    private static void Lines(string path, Action<JsonValue> take)
    {
        if (!File.Exists(path)) return;
        using var reader = new StreamReader(InputFile.Open(path, mostBytes: MostBytes));
        while (reader.ReadLine() is { } line)
        {
            try
            {
                take(JsonInput.Parse(path, Encoding.UTF8.GetBytes(line)));
            }
            catch (InputException)
            {
                return;
            }
        }
    }

    private void Take(JsonValue entry)
    {
        int step = entry["step"].Int(0);
        foreach (var (name, value) in entry.Members())
        {
            if (name is "step" or "epoch") continue;
            if (name == "message" && value.IsText) Messages.Add((step, value.Text()));
            else if (value.IsNumber) Add(name, step, value.Number());
            // NaN and Inf, which JSON lacks, are null in the log.
            else if (value.Element.ValueKind == JsonValueKind.Null) Add(name, step, double.NaN);
        }
    }

    private void Add(string name, double step, double value)
    {
        if (!_series.TryGetValue(name, out var list)) _series.Add(name, list = []);
        list.Add((step, value));
    }
}

/// <summary>What the model answered to an evaluation row after a step.</summary>
internal sealed record SampleAnswer(
    int Step, int Row, string Id, string Question, IReadOnlyList<string> Pictures, string Expected,
    string Answer)
{
    /// <exception cref="InputException">What must be there is not.</exception>
    public static SampleAnswer Read(JsonValue json)
    {
        int row = json["row"].Int(0);
        return new SampleAnswer(
            json["step"].Int(0), row, Text("id") is { Length: > 0 } id ? id : $"row {row}",
            Text("question"), json.Find("pictures") is { IsArray: true } list
                ? [.. list.Items().Where(p => p.IsText).Select(p => p.Text())] : [],
            Text("expected"), json["answer"].Text());

        string Text(string key) => json.Find(key) is { IsText: true } text ? text.Text() : "";
    }
}
