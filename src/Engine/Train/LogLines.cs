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

    // Most lines are shorter by far.
    private const int BlockBytes = 4096;

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
            foreach (RowPicture picture in answer.Row.Pictures.SelectMany(one => one.Each))
                json.WriteStringValue(
                    picture.Bytes is null ? answer.Row.Locate(picture) : picture.Path);
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

    // Looked for from the end, so that a log of any length is gone on with at once: what a run that
    // got further had written, torn or foreign lines among it, and the last words of one that ended
    // there.
    private long KeptBytes(int step)
    {
        long kept = LineStart(_file.Length);
        for (long end = kept; end > 0;)
        {
            long start = LineStart(end - 1);
            var line = new byte[end - start];
            RandomAccess.Read(_file.SafeFileHandle, line, start);
            int? at = StepOf(line, out bool isLast);
            if (at < step) break;
            if (at is null || at > step || isLast) kept = start;
            end = start;
        }

        return kept;
    }

    // Behind the last line end before a place of the file.
    private long LineStart(long before)
    {
        Span<byte> block = new byte[(int)Math.Min(BlockBytes, before)];
        while (before > 0)
        {
            block = block[..(int)Math.Min(block.Length, before)];
            long from = before - block.Length;
            RandomAccess.Read(_file.SafeFileHandle, block, from);
            int found = block.LastIndexOf((byte)'\n');
            if (found >= 0) return from + found + 1;
            before = from;
        }

        return 0;
    }

    private static int? StepOf(ReadOnlyMemory<byte> line, out bool isLast)
    {
        isLast = false;
        try
        {
            using var json = JsonDocument.Parse(line);
            if (json.RootElement.ValueKind != JsonValueKind.Object
                || !json.RootElement.TryGetProperty("step", out var value)
                || value.ValueKind != JsonValueKind.Number
                || !value.TryGetInt32(out int step)) return null;
            isLast = json.RootElement.TryGetProperty(TrainLog.RunTime, out _);
            return step;
        }
        catch (JsonException)
        {
            return null;
        }
    }

    private RunException Failed(Exception failure) =>
        new($"{_path}: cannot write: {Messages.Reason(failure, _path)}", failure);
}
