using System.Text.Json;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Report;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// train_log.jsonl: one JSON object per entry, flushed at once so that it can be followed; and
/// eval_answers.jsonl, one per answer that was generated in an evaluation. A resumed run cuts off
/// what a run that got further before it stopped had written.
/// </summary>
internal sealed class LogLines : ILogFile
{
    public const string FileName = RunRecord.LogFile;

    public const string AnswersName = RunRecord.AnswersFile;

    private readonly FileStream _file;
    private readonly string _path;

    /// <param name="folder">The output folder.</param>
    /// <param name="resumedStep">Entries after this step are cut off; null starts an empty
    /// file.</param>
    /// <param name="name">The file's name.</param>
    /// <exception cref="RunException">The file cannot be opened.</exception>
    public LogLines(string folder, int? resumedStep, string name = FileName)
    {
        _path = Path.Combine(folder, name);
        try
        {
            var mode = resumedStep is null ? FileMode.Create : FileMode.OpenOrCreate;
            // Without a buffer: what could not be written must not be tried again at the end.
            _file = new FileStream(
                _path, mode, FileAccess.ReadWrite, FileShare.Read, bufferSize: 0);
            if (resumedStep is not { } step) return;
            _file.SetLength(KeptBytes(step));
            _file.Seek(0, SeekOrigin.End);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            _file?.Dispose();
            throw Failed(failure);
        }
    }

    /// <exception cref="RunException">The file cannot be written.</exception>
    public void Write(LogEntry entry) => Write(entry.Step, json =>
    {
        json.WriteNumber("epoch", entry.Epoch);
        foreach (var (name, value) in entry.Values) LogState.WriteNumber(json, name, value);
        foreach (var (name, value) in entry.Timing) LogState.WriteNumber(json, name, value);
    });

    /// <inheritdoc cref="Write(LogEntry)"/>
    public void Write(int step, GeneratedRow answer) => Write(step, json =>
    {
        json.WriteNumber("row", answer.Row.Number);
        if (answer.Row.Id is not null) json.WriteString("id", answer.Row.Id);
        json.WriteString("question", answer.Row.Turns[answer.Row.Answer - 1].Content);
        if (answer.Row.Pictures.Count > 0)
        {
            json.WriteStartArray("pictures");
            foreach (RowPicture picture in answer.Row.Pictures)
                json.WriteStringValue(answer.Row.Locate(picture));
            json.WriteEndArray();
        }

        json.WriteString("expected", answer.Row.Expected);
        json.WriteString("answer", answer.Answer);
    });

    /// <summary>An entry of any kind.</summary>
    /// <exception cref="RunException">The file cannot be written.</exception>
    public void Write(int step, Action<Utf8JsonWriter> content)
    {
        byte[] line = JsonLine.Of(json =>
        {
            json.WriteNumber("step", step);
            content(json);
        });
        try
        {
            _file.Write(line);
        }
        catch (IOException failure)
        {
            throw Failed(failure);
        }
    }

    public void Dispose() => _file.Dispose();

    // Whole lines up to the first later, torn or foreign one.
    private long KeptBytes(int step)
    {
        long kept = 0;
        // Not disposed: that would close the file.
        var reader = new StreamReader(_file, leaveOpen: true);
        while (reader.ReadLine() is { } line)
        {
            long end = kept + System.Text.Encoding.UTF8.GetByteCount(line) + 1;
            if (end > _file.Length || !IsAtMost(line, step)) break;
            kept = end;
        }

        return kept;
    }

    private static bool IsAtMost(string line, int step)
    {
        try
        {
            using var json = JsonDocument.Parse(line);
            return json.RootElement.ValueKind == JsonValueKind.Object
                && json.RootElement.TryGetProperty("step", out var value)
                && value.ValueKind == JsonValueKind.Number
                && value.TryGetInt32(out int at) && at <= step;
        }
        catch (JsonException)
        {
            return false;
        }
    }

    private RunException Failed(Exception failure) =>
        new($"{_path}: cannot write: {Messages.Reason(failure, _path)}", failure);
}
