using System.Globalization;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Metrics;

namespace MiniCpmNative.Cli;

/// <summary>cpmx eval CONFIG.json and cpmx predict CONFIG.json</summary>
internal sealed class PredictCommand
{
    private const string Usage = """
        usage: cpmx eval [CONFIG.json] [--adapter DIR] [--base] [--data FILE] [--out FILE]
                         [--rows N] [--name value ...]
               cpmx predict ... the same, for rows that need no answers; nothing is scored

        Answers the last question of each row of eval_data_path with the configuration's result, and
        scores the answers by its metrics. A stopped run goes on when it is started again.

          --adapter DIR   this adapter instead of the result in output_dir; none for the base model
          --base          the base model too, side by side
          --data FILE     these rows instead of eval_data_path
          --out FILE      answers, one JSON object a row; output_dir/answers.jsonl when not given
          --rows N        only the first N rows
        """;

    private const double LineSeconds = 10;

    private readonly TextWriter _output;
    private readonly bool _terminal;
    private long _shown;
    private int _width;

    private PredictCommand(TextWriter output, bool terminal) =>
        (_output, _terminal) = (output, terminal);

    public static int Run(
        string[] args, bool help, bool scores, TextWriter output, Runners runners, bool terminal)
    {
        if (help)
        {
            output.WriteLine(Usage);
            return 0;
        }

        var own = new OwnOptions(args, ["--adapter", "--data", "--out", "--rows"], ["--base"]);
        TrainArguments arguments = TrainReader.Read(
            own.Rest, Environment.CurrentDirectory, output.WriteLine);
        PredictRequest request = Request(own, arguments, scores);
        bool stopped = false;
        using var signal = PosixSignalRegistration.Create(PosixSignal.SIGINT, context =>
        {
            context.Cancel = !stopped;
            Volatile.Write(ref stopped, true);
        });
        var command = new PredictCommand(output, terminal);
        PredictResult? result = runners.Predict(arguments, request, command.Line, command.Progress,
            () => !Volatile.Read(ref stopped));
        if (result is null)
        {
            command.Line("stopped; the same command goes on");
            return 130;
        }

        command.Line($"{Messages.Number(result.Rows)} rows answered: {request.Out}");
        if (result.Scores.Count == 0) return 0;
        int name = result.Scores.Max(score => score.Metric.Length) + 2;
        command.Line("".PadRight(name)
            + string.Concat(request.Sides.Select(side => side.Name.PadLeft(10))));
        foreach (var (metric, values) in result.Scores)
            command.Line(metric.PadRight(name) + string.Concat(values.Select(value =>
                value.ToString("0.0000", CultureInfo.InvariantCulture).PadLeft(10))));
        return 0;
    }

    private static PredictRequest Request(OwnOptions own, TrainArguments arguments, bool scores)
    {
        DataSources data = own.Text("--data") is { } given ? Path.GetFullPath(given)
            : arguments.EvaluationData ?? throw new InputException(
                "eval_data_path is missing: the rows to answer (or --data FILE)");
        int? rows = null;
        if (own.Text("--rows") is { } number)
            rows = int.TryParse(number, NumberStyles.None, CultureInfo.InvariantCulture, out int n)
                && n > 0 ? n : throw new InputException(
                    $"--rows is {Messages.Quote(number)}, expected a whole number above 0");
        var (model, adapter) = Tuned(own.Text("--adapter"), arguments);
        string plain = arguments.ModelNameOrPath!;
        List<PredictSide> sides = [];
        if (own.Has("--base") || (model, adapter) == (plain, null))
            sides.Add(new("base", plain, null));
        if ((model, adapter) != (plain, null)) sides.Add(new("tuned", model, adapter));
        return new PredictRequest(
            data, Path.GetFullPath(
                own.Text("--out") ?? Path.Combine(arguments.OutputDir, "answers.jsonl")),
            sides, scores ? Metric.Of(arguments.Metrics) : [], rows);
    }

    private static (string Model, string? Adapter) Tuned(string? given, TrainArguments arguments)
    {
        string plain = arguments.ModelNameOrPath!, result = arguments.OutputDir;
        if (given == "none") return (plain, null);
        if (given is not null) return (plain, Path.GetFullPath(given));
        if (File.Exists(Path.Combine(result, AdapterConfig.FileName))) return (plain, result);
        if (File.Exists(Path.Combine(result, "config.json"))) return (result, null);
        throw new InputException(
            $"output_dir {result} has no result yet: train first, or give --adapter DIR (none for "
            + "the base model)");
    }

    private void Line(string line)
    {
        Clear();
        _output.WriteLine(line);
    }

    private void Clear()
    {
        if (_width > 0) _output.Write("\r" + new string(' ', _width) + "\r");
        _width = 0;
    }

    private void Progress(PredictProgress p)
    {
        bool due = p.Done == p.Rows || _shown == 0
            || TimeProvider.System.GetElapsedTime(_shown).TotalSeconds
                >= (_terminal ? 0.2 : LineSeconds);
        if (!due) return;
        _shown = TimeProvider.System.GetTimestamp();
        var left = TimeSpan.FromSeconds(Math.Min(p.SecondsLeft, 1e8));
        string line = string.Create(CultureInfo.InvariantCulture,
            $"{p.Side}: {p.Done} of {p.Rows} rows, {p.TokensPerSecond:0} tokens/s, ")
            + string.Create(CultureInfo.InvariantCulture,
                $"{(int)left.TotalHours}:{left:mm\\:ss} left");
        if (!_terminal)
        {
            _output.WriteLine(line);
            return;
        }

        line = line[..Math.Min(line.Length, Math.Max(1, Terminal.Columns() - 1))];
        Clear();
        _output.Write(line);
        _output.Flush();
        _width = line.Length;
    }
}
