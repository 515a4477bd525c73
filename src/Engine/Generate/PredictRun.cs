using System.Diagnostics;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Metrics;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Generate;

/// <summary>A model that answers, under the name that its answers have in the file.</summary>
public sealed record PredictSide(string Name, string Model, string? Adapter);

/// <summary>What `cpmx eval` and `cpmx predict` were asked for.</summary>
/// <param name="Data">The rows.</param>
/// <param name="Out">The file of answers, a JSON object for each row.</param>
/// <param name="Sides">Who answers, one after the other.</param>
/// <param name="Metrics">How answers are scored; none where rows need not have any.</param>
/// <param name="Rows">Only the first so many rows.</param>
public sealed record PredictRequest(
    DataSources Data, string Out, IReadOnlyList<PredictSide> Sides, IReadOnlyList<Metric> Metrics,
    int? Rows = null);

/// <summary>How far it is.</summary>
public readonly record struct PredictProgress(
    string Side, int Done, int Rows, double TokensPerSecond, double SecondsLeft);

/// <summary>Each metric's score of each side's answers.</summary>
public sealed record PredictResult(
    int Rows, IReadOnlyList<(string Metric, IReadOnlyList<double> Scores)> Scores);

/// <summary>
/// Answers the rows of a file by one model or several. Answers go into OUT.partial as they come, so
/// that the same command goes on where one was stopped; at the end they stand in OUT in the order
/// of the rows, with each one's scores.
/// </summary>
public sealed class PredictRun
{
    private readonly TrainArguments _arguments;
    private readonly PredictRequest _request;
    private readonly Action<string> _say;
    // By the row's number in its file, which stays when rows before it turn out bad.
    private readonly Dictionary<(string Side, int Number), RowAnswer> _answers = [];

    private PredictRun(TrainArguments arguments, PredictRequest request, Action<string> say) =>
        (_arguments, _request, _say) = (arguments, request, say);

    private string Partial => _request.Out + ".partial";

    /// <summary>Null when it was stopped.</summary>
    /// <param name="arguments">How is answered: generation, device, data keys.</param>
    /// <param name="request">What by whom.</param>
    /// <param name="say">Takes lines for the user.</param>
    /// <param name="progress">Called after each batch.</param>
    /// <param name="goesOn">False stops.</param>
    /// <param name="devices">Opens the device; null takes the machine's.</param>
    /// <exception cref="InputException">Model, adapter, rows or settings are unusable.</exception>
    /// <exception cref="RunException">The file cannot be written.</exception>
    public static PredictResult? Run(
        TrainArguments arguments, PredictRequest request, Action<string> say,
        Action<PredictProgress> progress, Func<bool> goesOn, DeviceSource? devices = null)
    {
        var run = new PredictRun(arguments, request, say);
        DataRows? rows = null;
        try
        {
            Directory.CreateDirectory(Path.GetDirectoryName(request.Out)!);
            foreach (PredictSide side in request.Sides)
            {
                using AskedModel model = AskedModel.Open(
                    arguments with { ModelNameOrPath = side.Model }, side.Adapter, devices, say);
                rows ??= run.Rows(model);
                run.Ask(side, model, rows, progress, goesOn);
                if (!goesOn()) return null;
            }

            return run.Finish(rows!);
        }
        catch (BadRowException bad)
        {
            throw new InputException(bad.Message, bad);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new RunException(
                $"{request.Out}: cannot write: {Messages.OneLine(failure.Message)}", failure);
        }
    }

    private DataRows Rows(AskedModel model)
    {
        DataRows rows = DataRows.Asked(_request.Data, _arguments, model.Rows, _say);
        if (_request.Metrics.Count == 0) return rows;
        for (int i = 0; i < Count(rows); i++)
            if (rows[i].Expected is null && rows[i].References.Count == 0)
                throw new InputException(rows[i].Bad(
                    "no answer to compare with: cpmx predict answers such rows").Message);
        return rows;
    }

    private int Count(DataRows rows) => Math.Min(rows.Count, _request.Rows ?? rows.Count);

    private void Ask(PredictSide side, AskedModel model, DataRows rows,
        Action<PredictProgress> progress, Func<bool> goesOn)
    {
        GenerationSettings settings = GenerationSettings.Of(
            _arguments, model.Model.Spec, model.Rows.Prompts.StopIds, chats: false);
        string key = Key(side, rows, settings);
        Restore(key, side.Name);
        int all = Count(rows), before = all - Missing().Count();
        if (before > 0) _say($"{side.Name}: {before:N0} of {all:N0} rows are answered already");
        using var partial = new FileStream(Partial, FileMode.Append, FileAccess.Write);
        // Behind a line that was torn off.
        partial.WriteByte((byte)'\n');
        Append(json => json.WriteString("key", key));
        long start = Stopwatch.GetTimestamp(), tokens = 0;
        int done = before;
        new RowAnswerer(model.Model, rows, settings, model.Counter).Run(
            [.. Missing()], _arguments.PerDeviceEvalBatchSize, (row, answer) =>
        {
            _answers[(side.Name, rows[row].Number)] = answer;
            Append(json =>
            {
                json.WriteString("side", side.Name);
                json.WriteNumber("row", rows[row].Number);
                json.WriteString("text", answer.Text);
                json.WriteBoolean("ended", answer.Ended);
                json.WriteStartArray("ids");
                foreach (int id in answer.Ids) json.WriteNumberValue(id);
                json.WriteEndArray();
            });
            tokens += answer.Ids.Length;
            double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
            done++;
            progress(new PredictProgress(side.Name, done, all, tokens / seconds,
                seconds / (done - before) * (all - done)));
        }, goesOn);

        IEnumerable<int> Missing() => Enumerable.Range(0, all)
            .Where(row => !_answers.ContainsKey((side.Name, rows[row].Number)));

        void Append(Action<Utf8JsonWriter> write)
        {
            partial.Write(JsonLine.Of(write));
            partial.Flush();
        }
    }

    // Whatever would change an answer.
    private string Key(PredictSide side, DataRows rows, GenerationSettings settings)
    {
        string all = string.Join('\n', side, rows.Digest, settings,
            string.Join(' ', settings.StopIds), _arguments.MaxSliceNums, _arguments.VideoFps,
            _arguments.VideoMaxFrames, _arguments.VideoMaxSliceNums, _arguments.VideoPacking,
            _arguments.VideoStackFrames,
            _arguments.ApplyExifOrientation, _arguments.Bf16, _arguments.Fp16,
            Quantisation.Of(_arguments), string.Join('\n',
                new[] { side.Model, side.Adapter }.OfType<string>()
                    .SelectMany(folder => Directory.EnumerateFiles(folder, "*.safetensors"))
                    .Select(file => new FileInfo(file)).OrderBy(file => file.FullName)
                    .Select(f => $"{f.FullName} {f.Length} {f.LastWriteTimeUtc.Ticks}")));
        return Convert.ToHexStringLower(SHA256.HashData(Encoding.UTF8.GetBytes(all)));
    }

    // Answers behind the line of their key; a torn line is none.
    private void Restore(string key, string side)
    {
        if (!File.Exists(Partial)) return;
        bool same = false;
        foreach (string line in File.ReadLines(Partial))
        {
            try
            {
                using var json = JsonDocument.Parse(line);
                JsonElement found = json.RootElement;
                if (found.TryGetProperty("key", out var its)) same = its.GetString() == key;
                else if (same && found.GetProperty("side").GetString() == side)
                    _answers[(side, found.GetProperty("row").GetInt32())] = new RowAnswer(
                        found.GetProperty("text").GetString()!,
                        [.. found.GetProperty("ids").EnumerateArray().Select(id => id.GetInt32())],
                        found.GetProperty("ended").GetBoolean());
            }
            catch (Exception torn) when (torn is JsonException or KeyNotFoundException
                or InvalidOperationException)
            {
                continue;
            }
        }
    }

    private PredictResult Finish(DataRows rows)
    {
        int count = Count(rows);
        // [metric][side]
        MetricResult[][] results = [.. _request.Metrics.Select(metric => _request.Sides.Select(
            side => metric.Score([.. Enumerable.Range(0, count).Select(row => RowAnswerer.Scored(
                rows[row], _answers[(side.Name, rows[row].Number)], rows.Format.Tokenizer))])).ToArray())];
        AtomicFile.Write(_request.Out, stream =>
        {
            for (int row = 0; row < count; row++) stream.Write(JsonLine.Of(json => Write(json, row)));
        });
        File.Delete(Partial);
        return new PredictResult(count, [.. _request.Metrics.Select((metric, m) =>
            (metric.Name, (IReadOnlyList<double>)[.. results[m].Select(result => result.All)]))]);

        void Write(Utf8JsonWriter json, int number)
        {
            Row row = rows[number];
            json.WriteNumber("row", row.Number);
            if (row.Id is not null) json.WriteString("id", row.Id);
            json.WriteString("question", row.Turns[row.Answer - 1].Content);
            if (row.Expected is { } expected) json.WriteString("expected", expected);
            for (int s = 0; s < _request.Sides.Count; s++)
            {
                string side = _request.Sides[s].Name;
                RowAnswer answer = _answers[(side, row.Number)];
                json.WriteString(side, answer.Text);
                if (!answer.Ended) json.WriteBoolean(side + "_cut", true);
                for (int m = 0; m < results.Length; m++)
                    json.WriteNumber(
                        $"{side}_{_request.Metrics[m].Name}", results[m][s].Each[number]);
            }
        }
    }
}
