using System.Text.Json;
using System.Text.Unicode;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Reads training data in the official format: a JSON list of {id, image, conversations}, or the
/// same objects one to a line (.jsonl). Every row is looked at; a faulty one is listed with its
/// reason and does not stop the others. Only what makes the file itself unreadable throws.
/// </summary>
public static class RowFile
{
    // Where other tools put media; a row that has them would lose its pictures unseen.
    private static readonly string[] s_otherKeys =
        ["images", "picture", "pictures", "video", "videos", "audio", "audios"];

    // What changes a row's meaning in other tools: passed over, it would be trained without.
    private static readonly string[] s_otherMeanings =
    [
        "system", "tools", "functions", "history", "query", "instruction", "response", "messages",
        "rejected", "rejected_response", "rejected_messages", "rejected_images", "chosen",
        "objects", "solution", "label", "kto_tag", "loss", "loss_scale", "margin",
    ];

    private static readonly string[] s_otherTurnMeanings =
        ["loss", "loss_scale", "weight", "tool_calls", "reasoning_content", "images", "image"];

    /// <exception cref="InputException">
    /// Missing, not UTF-8, not JSON, not rows, or empty.
    /// </exception>
    public static RowSet Read(string path) => Parse(path, InputFile.ReadAll(path, Array.MaxLength));

    /// <param name="path">The file, for messages.</param>
    /// <param name="bytes">Its content.</param>
    /// <param name="asked">Rows are only asked, and need no answers.</param>
    /// <inheritdoc cref="Read"/>
    internal static RowSet Parse(string path, ReadOnlyMemory<byte> bytes, bool asked = false)
    {
        if (bytes.Span.StartsWith("\uFEFF"u8)) bytes = bytes[3..];
        if (!Utf8.IsValid(bytes.Span)) throw new InputException($"{path}: {NotUtf8(bytes.Span)}");
        var rows = new List<Row>();
        var bad = new List<BadRow>();
        var first = bytes.Span.TrimStart(" \t\r\n"u8);
        if (first.IsEmpty) throw new InputException($"{path}: is empty, expected a list of rows");
        if (first[0] == '[') ReadList(path, bytes, asked, rows, bad);
        else if (first[0] == '{') ReadLines(path, bytes, asked, rows, bad);
        else throw new InputException(
            $"{path}: is neither a JSON list of rows nor one row per line");
        if (rows.Count + bad.Count == 0) throw new InputException($"{path}: has no rows");
        return new RowSet(rows, bad);
    }

    private static void ReadList(
        string path, ReadOnlyMemory<byte> json, bool asked, List<Row> rows, List<BadRow> bad)
    {
        var reader = new Utf8JsonReader(json.Span);
        int number = 0;
        try
        {
            reader.Read();
            while (reader.Read() && reader.TokenType != JsonTokenType.EndArray)
            {
                number++;
                int start = (int)reader.TokenStartIndex;
                reader.Skip();
                Add(path, number, json[start..(int)reader.BytesConsumed], asked, rows, bad);
            }
            reader.Read();
        }
        catch (JsonException e)
        {
            throw new InputException(
                $"{path}: is not valid JSON at line {(e.LineNumber ?? 0) + 1}, byte "
                + $"{(e.BytePositionInLine ?? 0) + 1}, behind row {number} ({Short(e)})", e);
        }
    }

    private static void ReadLines(
        string path, ReadOnlyMemory<byte> json, bool asked, List<Row> rows, List<BadRow> bad)
    {
        for (int number = 1; !json.IsEmpty; number++)
        {
            int end = json.Span.IndexOf((byte)'\n');
            var line = end < 0 ? json : json[..end];
            json = end < 0 ? default : json[(end + 1)..];
            if (line.Span.IndexOfAnyExcept(" \t\r"u8) >= 0) Add(path, number, line, asked, rows, bad);
        }
    }

    private static void Add(
        string path, int number, ReadOnlyMemory<byte> json, bool asked, List<Row> rows,
        List<BadRow> bad)
    {
        string? id = null;
        int? turn = null;
        try
        {
            using var document = JsonDocument.Parse(json);
            var row = document.RootElement;
            if (row.ValueKind != JsonValueKind.Object)
                throw new FormatException($"is {Kind(row)}, expected an object");
            id = Id(row.Member("id"));
            foreach (string key in s_otherKeys)
                if (!row.Member(key).IsNull())
                    throw new FormatException(
                        $"key \"{key}\" is not used here; pictures belong in \"image\"");
            MustNotHave(row, s_otherMeanings);
            var (names, pictures) = Pictures(row.Member("image"));
            var turns = Turns(row.Member("conversations"), asked, ref turn);
            rows.Add(new Row(path, number, id, names, pictures, turns)
            {
                References = References(row.Member("references")),
            });
        }
        catch (FormatException e)
        {
            bad.Add(new BadRow(path, number, id, turn, e.Message));
        }
        catch (JsonException e)
        {
            bad.Add(new BadRow(path, number, null, null, $"is not valid JSON ({Short(e)})"));
        }
        catch (InvalidOperationException)
        {
            bad.Add(new BadRow(path, number, id, turn, "has an unpaired surrogate escape"));
        }
    }

    // Known keys that say nothing, such as an empty system text, lose nothing.
    private static void MustNotHave(JsonElement of, string[] keys)
    {
        foreach (string key in keys)
            if (of.Member(key) is { ValueKind: not JsonValueKind.Undefined } value
                && !value.IsNull() && !IsEmpty(value))
                throw new FormatException($"key \"{key}\" is not used here, and without it the row "
                    + "would mean something else: take the key out, or put what it says into the "
                    + "turns' texts");

        static bool IsEmpty(JsonElement value) => value.ValueKind switch
        {
            JsonValueKind.String => value.GetString() == "",
            JsonValueKind.Array => value.GetArrayLength() == 0,
            JsonValueKind.Object => !value.EnumerateObject().Any(),
            _ => false,
        };
    }

    private static string? Id(JsonElement id) => id.ValueKind switch
    {
        JsonValueKind.String => id.GetString(),
        JsonValueKind.Number => id.GetRawText(),
        JsonValueKind.Null or JsonValueKind.Undefined => null,
        _ => throw new FormatException($"\"id\" is {Kind(id)}, expected text or a number"),
    };

    private static (PictureNames, RowPicture[]) Pictures(JsonElement image)
    {
        switch (image.ValueKind)
        {
            case JsonValueKind.Null or JsonValueKind.Undefined:
                return (PictureNames.None, []);
            case JsonValueKind.String:
                return (PictureNames.Single, [new RowPicture("<image>", PicturePath(image))]);
            case JsonValueKind.Array:
                var listed = image.Items()
                    .Select(item => new RowPicture("<image>", PicturePath(item))).ToArray();
                return (PictureNames.Listed, listed);
            case JsonValueKind.Object:
                var tagged = image.EnumerateObject()
                    .Select(item => new RowPicture(item.Name, PicturePath(item.Value))).ToArray();
                if (tagged.GroupBy(item => item.Tag)
                    .FirstOrDefault(g => g.Count() > 1) is { } twice)
                    throw new FormatException($"\"image\" has {Messages.Quote(twice.Key)} twice");
                return (tagged is [{ Tag: "<image>" }] ? PictureNames.Single : PictureNames.Tagged,
                    tagged);
            default:
                throw new FormatException(
                    $"\"image\" is {Kind(image)}, expected a path, a list of paths "
                    + "or {\"<image_00>\": path, ...}");
        }
    }

    private static string PicturePath(JsonElement path) =>
        path.Text() is { Length: > 0 } text ? text
        : throw new FormatException($"a picture's path is {Kind(path)}, expected text");

    private static string[] References(JsonElement list)
    {
        if (list.IsNull()) return [];
        return list.ValueKind == JsonValueKind.Array
            && list.EnumerateArray().Select(text => text.Text()).ToArray() is { Length: > 0 } texts
            && !texts.Contains(null) ? texts.OfType<string>().ToArray() : throw new FormatException(
                $"\"references\" is {Kind(list)}, expected a list of right answers");
    }

    private static ChatTurn[] Turns(JsonElement list, bool asked, ref int? turn)
    {
        if (list.IsNull()) throw new FormatException("\"conversations\" is missing");
        if (list.ValueKind != JsonValueKind.Array)
            throw new FormatException(
                $"\"conversations\" is {Kind(list)}, expected a list of turns");
        int least = asked ? 1 : 2;
        if (list.GetArrayLength() < least)
            throw new FormatException(
                $"\"conversations\" has {list.GetArrayLength()} turn(s), expected at least {least}");
        var turns = new ChatTurn[list.GetArrayLength()];
        int i = 0;
        // Enumerated: an index walks from the start each time.
        foreach (var item in list.EnumerateArray())
        {
            turn = i + 1;
            string role = Text(item, "role");
            MustNotHave(item, s_otherTurnMeanings);
            if (role is not ("user" or "assistant"))
                throw new FormatException(
                    $"role is {Messages.Quote(role)}, expected \"user\" or \"assistant\"");
            if (i == 0 && role != "user")
                throw new FormatException(
                    "role is \"assistant\", the first turn must be the user's");
            turns[i++] = new ChatTurn(role, Text(item, "content"));
        }
        turn = null;
        return asked || turns.Any(item => item.Role == "assistant") ? turns
            : throw new FormatException("no turn has role \"assistant\": nothing to learn");
    }

    private static string Text(JsonElement turn, string key)
    {
        if (turn.ValueKind != JsonValueKind.Object)
            throw new FormatException($"is {Kind(turn)}, expected {{\"role\", \"content\"}}");
        var value = turn.Member(key);
        if (value.ValueKind == JsonValueKind.Undefined)
            throw new FormatException($"\"{key}\" is missing");
        return value.Text()
            ?? throw new FormatException($"\"{key}\" is {Kind(value)}, expected text");
    }

    private static string Kind(JsonElement value) => value.ValueKind switch
    {
        JsonValueKind.Object => "an object",
        JsonValueKind.Array => "a list",
        JsonValueKind.Number => "a number",
        JsonValueKind.String => value.GetString() == "" ? "empty" : "text",
        JsonValueKind.True => "true",
        JsonValueKind.False => "false",
        _ => "null",
    };

    private static string Short(JsonException e) =>
        Messages.OneLine(e.Message.Split(" LineNumber", 2)[0]).TrimEnd('.');

    private static string NotUtf8(ReadOnlySpan<byte> bytes)
    {
        // The longest valid start, by halving: validity of starts is
        // monotonous up to a cut character.
        int valid = 0, end = bytes.Length;
        while (end - valid > 4)
        {
            int middle = valid + ((end - valid) / 2);
            int cut = middle;
            while (cut > valid && (bytes[cut] & 0xC0) == 0x80 && middle - cut < 3) cut--;
            if (cut > valid && Utf8.IsValid(bytes[valid..cut])) valid = cut;
            else end = middle;
        }
        int line = 1 + bytes[..valid].Count((byte)'\n');
        return $"is not UTF-8 at about line {line}, byte {valid:N0} of the file";
    }
}
