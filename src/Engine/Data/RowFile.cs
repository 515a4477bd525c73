using System.Text.Json;
using System.Text.Unicode;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Reads a file of training data: a JSON list of rows, the same objects one to a line (.jsonl) or
/// behind each other, CSV, or Parquet, each in the format that its first row has
/// (<see cref="RowColumns"/>). Every row is looked at; a faulty one is listed with its reason and
/// does not stop the others. Only what makes the file itself unreadable throws.
/// </summary>
public sealed class RowFile
{
    // What people hand in by its first bytes, with the way to what is read.
    private static readonly (byte[] Start, string Kind)[] s_kinds =
    [
        ([0x1f, 0x8b], "compressed by gzip (gunzip it)"),
        ([0x28, 0xb5, 0x2f, 0xfd], "compressed by Zstandard (unzstd it)"),
        ("PK\x03\x04"u8.ToArray(),
            "a zip archive or an Excel workbook (unzip it, or save the sheet as .csv)"),
        ("ARROW1"u8.ToArray(), "an Arrow file (save the data set with to_parquet)"),
        ([0xff, 0xff, 0xff, 0xff], "an Arrow file (save the data set with to_parquet)"),
        ("SQLite format 3"u8.ToArray(), "an SQLite database"),
        ([0x80, 2], "a pickle of Python's"), ([0x80, 3], "a pickle of Python's"),
        ([0x80, 4], "a pickle of Python's"), ([0x80, 5], "a pickle of Python's"),
        ([0xff, 0xfe], "in UTF-16 (save it in UTF-8)"),
        ([0xfe, 0xff], "in UTF-16 (save it in UTF-8)"),
        ("version https://git-lfs"u8.ToArray(),
            "a pointer of Git LFS, not the rows themselves (run git lfs pull)"),
    ];

    private readonly string _path;
    private readonly RowOptions _options;
    private readonly int _before;
    private readonly List<Row> _rows = [];
    private readonly List<BadRow> _bad = [];
    private RowReader? _reader;

    private RowFile(string path, RowOptions options, int before, RowColumns? columns)
    {
        (_path, _options, _before) = (path, options, before);
        if ((columns ?? DatasetInfo.Of(path)) is { } known)
            _reader = new RowReader(path, known, options);
    }

    /// <exception cref="InputException">
    /// Missing, not UTF-8, of no known kind, not rows, or empty.
    /// </exception>
    public static RowSet Read(string path) => Parse(path, InputFile.ReadAll(path, Array.MaxLength));

    /// <param name="path">The file, for messages.</param>
    /// <param name="bytes">Its content.</param>
    /// <param name="options">How rows are read.</param>
    /// <param name="before">Rows of the files before it.</param>
    /// <param name="columns">What its columns are called, where that is known.</param>
    /// <inheritdoc cref="Read"/>
    internal static RowSet Parse(string path, ReadOnlyMemory<byte> bytes,
        RowOptions options = default, int before = 0, RowColumns? columns = null)
    {
        var file = new RowFile(path, options, before, columns);
        if (ParquetRows.Accepts(bytes.Span)) ParquetRows.Read(path, bytes, file.Add);
        else file.ReadText(bytes);
        if (file._rows.Count + file._bad.Count == 0)
            throw new InputException($"{path}: has no rows");
        return new RowSet(file._rows, file._bad, file._reader?.Columns.Name);
    }

    private void ReadText(ReadOnlyMemory<byte> bytes)
    {
        if (Kind(bytes.Span) is { } kind)
            throw new InputException($"{_path}: is {kind}, expected .json, .jsonl, .csv or "
                + "Parquet");
        if (bytes.Span.StartsWith("\uFEFF"u8)) bytes = bytes[3..];
        if (!Utf8.IsValid(bytes.Span)) throw new InputException($"{_path}: {NotUtf8(bytes.Span)}");
        var first = bytes.Span.TrimStart(" \t\r\n"u8);
        if (first.IsEmpty) throw new InputException($"{_path}: is empty, expected a list of rows");
        if (CsvRows.Accepts(_path)) CsvRows.Read(_path, bytes, Add, Refuse);
        else if (first[0] == '[' || (first[0] == '{' && IsPretty(first))) ReadValues(bytes);
        else if (first[0] == '{') ReadLines(bytes);
        else throw new InputException($"{_path}: is neither a JSON list of rows nor one row per "
            + "line (tables are read as .csv, .tsv or Parquet)");
    }

    // A list of rows, or objects that take several lines each, behind each other.
    private void ReadValues(ReadOnlyMemory<byte> json)
    {
        bool isList = json.Span.TrimStart(" \t\r\n"u8)[0] == '[';
        var reader = new Utf8JsonReader(
            json.Span, new JsonReaderOptions { AllowMultipleValues = !isList });
        int number = 0;
        try
        {
            if (isList) reader.Read();
            while (reader.Read())
            {
                if (isList && reader.TokenType == JsonTokenType.EndArray) continue;
                number++;
                int start = (int)reader.TokenStartIndex;
                reader.Skip();
                Add(number, json[start..(int)reader.BytesConsumed]);
            }
        }
        catch (JsonException e)
        {
            throw new InputException($"{_path}: is not valid JSON at line "
                + $"{(e.LineNumber ?? 0) + 1}, byte {(e.BytePositionInLine ?? 0) + 1}, behind row "
                + $"{number} ({JsonFault.Reason(json.Span, e)})", e);
        }
    }

    private void ReadLines(ReadOnlyMemory<byte> json)
    {
        for (int number = 1; !json.IsEmpty; number++)
        {
            int end = json.Span.IndexOf((byte)'\n');
            var line = end < 0 ? json : json[..end];
            json = end < 0 ? default : json[(end + 1)..];
            if (line.Span.IndexOfAnyExcept(" \t\r"u8) >= 0) Add(number, line);
        }
    }

    // Whether the first object goes on over the next lines: its line does not end it, and either
    // must go on, or the next line is no row. (A line that is cut off is one bad row.)
    private static bool IsPretty(ReadOnlySpan<byte> json)
    {
        int end = json.IndexOf((byte)'\n');
        if (end < 0) return false;
        var rest = json[(end + 1)..].TrimStart(" \t\r\n"u8);
        var line = json[..end].TrimEnd(" \t\r"u8);
        return !rest.IsEmpty && line[^1] != '}'
            && (line[^1] is (byte)',' or (byte)'[' or (byte)'{' or (byte)':' || rest[0] != '{');
    }

    private void Add(int number, ReadOnlyMemory<byte> json)
    {
        string? id = null;
        int? turn = null;
        try
        {
            using var document = JsonDocument.Parse(json, RowValues.Strict);
            var row = document.RootElement;
            if (row.ValueKind == JsonValueKind.Object) _reader ??= Recognized(row);
            var reader = _reader ?? new RowReader(_path, RowColumns.Official, _options);
            _rows.Add(reader.Read(number, _before + number, row, ref id, ref turn));
        }
        catch (FormatException e)
        {
            Refuse(number, id, turn, e.Message);
        }
        catch (JsonException e)
        {
            Refuse(number, null, null, $"is not valid JSON ({JsonFault.Reason(json.Span, e)})");
        }
        catch (InvalidOperationException)
        {
            Refuse(number, id, turn, "has an unpaired surrogate escape");
        }
    }

    private void Refuse(int number, string reason) => Refuse(number, null, null, reason);

    private void Refuse(int number, string? id, int? turn, string reason) =>
        _bad.Add(new BadRow(_path, number, id, turn, reason) { Place = _before + number });

    private RowReader? Recognized(JsonElement row)
    {
        try
        {
            return RowColumns.Of(row) is { } known ? new RowReader(_path, known, _options) : null;
        }
        catch (FormatException problem)
        {
            throw new InputException($"{_path}: {problem.Message}", problem);
        }
    }

    private static string? Kind(ReadOnlySpan<byte> bytes)
    {
        foreach (var (start, kind) in s_kinds)
            if (bytes.StartsWith(start)) return kind;
        return null;
    }

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
        return $"is not UTF-8 at about line {line}, byte {valid:N0} of the file (iconv -f GB18030 "
            + "-t UTF-8, or as it is encoded, converts it)";
    }
}
