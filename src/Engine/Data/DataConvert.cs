using System.Text.Encodings.Web;
using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// `cpmx data convert`: rows of any format that is read, written in the official one. Pictures that
/// stand in the rows become files in a folder beside the result.
/// </summary>
/// <param name="From">The rows.</param>
/// <param name="Out">A .json file, a list, or a .jsonl file, a row on each line.</param>
/// <param name="Boxes">How boxes are written.</param>
/// <param name="Skip">Bad rows are left out, not refused.</param>
public sealed record DataConvert(DataSources From, string Out, BoxFormat Boxes, bool Skip)
{
    private static readonly JsonWriterOptions s_plain =
        new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    private string Folder => Path.GetDirectoryName(Path.GetFullPath(Out))!;

    private string PictureFolder => Path.GetFileNameWithoutExtension(Out) + "_pictures";

    /// <summary>Writes the file, and lines on what was done; false when rows are bad and nothing
    /// was written.</summary>
    /// <exception cref="InputException">The rows cannot be read, or OUT cannot be it.</exception>
    /// <exception cref="RunException">The result cannot be written.</exception>
    public bool Run(TextWriter output)
    {
        bool lines = Path.GetExtension(Out).ToLowerInvariant() switch
        {
            ".jsonl" => true,
            ".json" => false,
            _ => throw new InputException($"{Out}: expected a name that ends in .json or .jsonl"),
        };
        if (DataFiles.Of(From).Any(file => Path.GetFullPath(file.Path) == Path.GetFullPath(Out)))
            throw new InputException($"{Out}: is one of the files to convert; choose another name");
        var (set, _, formats) = DataRows.ReadSet(From, new RowOptions(Asked: true), Boxes);
        foreach (string format in formats) output.WriteLine(format);
        var bad = new List<BadRow>(set.Bad);
        var good = new List<(Row Row, string[] Paths, string[] Sounds)>();
        foreach (Row row in set.Rows)
        {
            try
            {
                _ = RowText.Compose(SoundText.Tagged(row), (_, _) => "", []);
                good.Add((row with { Videos = [.. row.Videos.Select(v => Moved(row, v))] },
                    [.. row.Pictures.Select(picture => PathOf(row, picture))],
                    [.. row.Sounds.Select(sound => SoundOf(row, sound))]));
            }
            catch (BadRowException failure)
            {
                bad.Add(failure.Row);
            }
        }

        foreach (BadRow row in bad.OrderBy(row => row.Place)) output.WriteLine(row);
        if (good.Count == 0 || (bad.Count > 0 && !Skip))
        {
            output.WriteLine($"{bad.Count:N0} bad rows, nothing is written"
                + (good.Count > 0 ? " (--on_bad_row skip leaves them out)" : ""));
            return false;
        }

        try
        {
            WritePictures(good);
            AtomicFile.Write(Out, stream => Write(stream, good, lines));
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new RunException(
                $"{Out}: cannot write: {Messages.Reason(failure, Out)}", failure);
        }

        output.WriteLine($"{Out}: {good.Count:N0} rows written, {bad.Count:N0} left out");
        Tell(good.Count(row => row.Row.Turns[0] is { Role: "system", Content.Length: > 0 }),
            "have a system turn");
        Tell(good.Count(row => row.Row.Turns.Any(turn => turn.HasFunctions)), "have functions");
        Tell(good.Count(row => row.Sounds.Length > 0), "have sounds (\"audio\")");
        Tell(good.Count(row => row.Row.Turns.Any(turn => turn.Trained == false)),
            "have answers that are not learned (\"loss\": false)");
        Tell(good.Count(row => row.Row.Videos.Count > 0), "have videos");
        return true;

        void Tell(int rows, string what)
        {
            if (rows > 0)
                output.WriteLine($"  {rows:N0} rows {what}: cpmx reads that, the official script "
                    + "not");
        }
    }

    private string PathOf(Row row, RowPicture picture)
    {
        if (picture.Bytes is not { } bytes)
            return Relative(row.Locate(picture));
        try
        {
            string kind = Ending(bytes, picture.Path);
            string name = picture.Path["embedded picture ".Length..].Split(' ')[0];
            return $"{PictureFolder}/{name}.{kind}";
        }
        catch (InputException failure)
        {
            throw row.Bad(failure.Message);
        }
    }

    // With the paths that the new file has; frames that stand in the row become files.
    private RowVideo Moved(Row row, RowVideo video) => video with
    {
        Path = video.Bytes is not null
            ? throw row.Bad("has a video in the row itself: write it to a file, and name that")
            : video.Path is { } path
                ? Relative(row.Locate("video", path, p => Directory.Exists(p) || File.Exists(p)))
            : null,
        Frames = [.. video.Frames.Select(frame => frame with { Path = PathOf(row, frame) })],
    };

    private string Relative(string path) =>
        Path.GetRelativePath(Folder, Path.GetFullPath(path)).Replace('\\', '/');

    private static string Ending(byte[] bytes, string name) =>
        Images.PictureDecoder.Probe(bytes, name).Format switch
        {
            Images.PictureFormat.Jpeg => "jpg",
            var format => format.ToString().ToLowerInvariant(),
        };

    private void WritePictures(List<(Row Row, string[] Paths, string[] Sounds)> rows)
    {
        var written = new HashSet<string>();
        foreach (var (row, paths, _) in rows)
            foreach (var (picture, path) in row.Pictures.Zip(paths).Concat(row.Videos
                .SelectMany(video => video.Frames).Select(frame => (frame, frame.Path))))
            {
                if (picture.Bytes is not { } bytes || !written.Add(path)) continue;
                Directory.CreateDirectory(Path.Combine(Folder, PictureFolder));
                AtomicFile.Write(Path.Combine(Folder, path), stream => stream.Write(bytes));
            }
    }

    private static void Write(
        Stream stream, List<(Row Row, string[] Paths, string[] Sounds)> rows, bool lines)
    {
        for (int i = 0; i < rows.Count; i++)
        {
            stream.Write(lines ? [] : i == 0 ? "[\n"u8 : ",\n"u8);
            using (var json = new Utf8JsonWriter(stream, s_plain))
                Write(json, rows[i].Row, rows[i].Paths, rows[i].Sounds);
            if (lines) stream.Write("\n"u8);
        }

        if (!lines) stream.Write("\n]\n"u8);
    }

    // A path, or what the row itself holds.
    private string SoundOf(Row row, RowPicture sound) => sound.Bytes is { } bytes
        ? "data:audio/*;base64," + Convert.ToBase64String(bytes)
        : Relative(row.Locate(sound));

    private static void Write(Utf8JsonWriter json, Row row, string[] paths, string[] sounds)
    {
        var turns = row.Turns.ToArray();
        json.WriteStartObject();
        if (row.Id is not null) json.WriteString("id", row.Id);
        if (row.Videos.Count > 0) Write(json, row.Videos, turns);
        if (row.Names == PictureNames.Single) json.WriteString("image", paths[0]);
        else if (paths.Length > 0)
        {
            // The official script shows several pictures at tags of their own.
            if (row.Names == PictureNames.Listed) Tag(turns, paths.Length);
            json.WriteStartObject("image");
            for (int i = 0; i < paths.Length; i++)
                json.WriteString(row.Names == PictureNames.Listed ? Name(i) : row.Pictures[i].Tag,
                    paths[i]);
            json.WriteEndObject();
        }

        if (sounds.Length > 0) Texts(json, "audio", sounds);
        if (turns[0].Tools is { } tools)
        {
            json.WriteStartArray("tools");
            foreach (string tool in tools) json.WriteRawValue(tool, skipInputValidation: true);
            json.WriteEndArray();
        }

        json.WriteStartArray("conversations");
        // A system turn may be there for the functions alone.
        foreach (var turn in turns.Where(turn => turn.Role != "system" || turn.Content.Length > 0))
        {
            json.WriteStartObject();
            json.WriteString("role", turn.Role);
            json.WriteString("content", turn.Content);
            if (turn.Calls is { } calls)
            {
                json.WriteStartArray("tool_calls");
                foreach (ToolCall call in calls)
                {
                    json.WriteStartObject();
                    json.WriteString("name", call.Name);
                    json.WriteString("arguments", call.Arguments);
                    json.WriteEndObject();
                }

                json.WriteEndArray();
            }

            if (turn.Trained == false) json.WriteBoolean("loss", false);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        if (row.References.Count > 0) Texts(json, "references", row.References);
        json.WriteEndObject();
    }

    private static void Texts(Utf8JsonWriter json, string key, IEnumerable<string> texts)
    {
        json.WriteStartArray(key);
        foreach (string text in texts) json.WriteStringValue(text);
        json.WriteEndArray();
    }

    private static void Write(
        Utf8JsonWriter json, IReadOnlyList<RowVideo> videos, ChatTurn[] turns)
    {
        json.WriteStartArray("videos");
        foreach (RowVideo video in videos)
        {
            json.WriteStartObject();
            if (video.Path is not null) json.WriteString("frames", video.Path);
            else Texts(json, "frames", video.Frames.Select(frame => frame.Path));
            if (video.Fps is { } fps) json.WriteNumber("fps", fps);
            if (video.TemporalIds is { } groups)
            {
                json.WriteStartArray("temporal_ids");
                foreach (int[] group in groups)
                {
                    json.WriteStartArray();
                    foreach (int id in group) json.WriteNumberValue(id);
                    json.WriteEndArray();
                }

                json.WriteEndArray();
            }

            json.WriteEndObject();
        }

        json.WriteEndArray();
        // Without tags they stand behind the pictures in front, which get tags.
        if (turns.Any(turn => turn.Role == "user"
            && turn.Content.Contains(RowVideo.Tag, StringComparison.Ordinal))) return;
        RowText.TagFirst(turns, Enumerable.Repeat(RowVideo.Tag, videos.Count));
    }

    private static void Tag(ChatTurn[] turns, int pictures)
    {
        const string plain = "<image>";
        int next = 0;
        for (int i = 0; i < turns.Length; i++)
        {
            string[] parts = turns[i].Content.Split(plain);
            for (int k = 1; k < parts.Length; k++) parts[k] = Name(next++) + parts[k];
            turns[i] = turns[i] with { Content = string.Concat(parts) };
        }

        if (next == 0) RowText.TagFirst(turns, Enumerable.Range(0, pictures).Select(Name));
    }

    private static string Name(int picture) => $"<image_{picture:00}>";
}
