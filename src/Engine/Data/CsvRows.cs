using System.Buffers;
using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Tables as text (RFC 4180): the first line names the columns, every cell is text, empty ones are
/// absent. Separated by commas, or by tabs in a .tsv file. Rows count from 1 behind the names.
/// </summary>
internal static class CsvRows
{
    public static bool Accepts(string path) =>
        Path.GetExtension(path).ToLowerInvariant() is ".csv" or ".tsv";

    /// <param name="path">The file, for messages and its separator.</param>
    /// <param name="bytes">Its content, in UTF-8.</param>
    /// <param name="add">Takes each row's number and the row as JSON.</param>
    /// <param name="refuse">Takes the number of a row that is none, and why.</param>
    /// <exception cref="InputException">It has no names of columns, or a quote stays
    /// open.</exception>
    public static void Read(string path, ReadOnlyMemory<byte> bytes,
        Action<int, ReadOnlyMemory<byte>> add, Action<int, string> refuse)
    {
        byte separator = Path.GetExtension(path).Equals(".tsv", StringComparison.OrdinalIgnoreCase)
            ? (byte)'\t' : (byte)',';
        var cells = new List<byte[]>();
        var rest = bytes.Span;
        int line = 1;
        string[]? names = null;
        var row = new ArrayBufferWriter<byte>();
        using var json = new Utf8JsonWriter(row, new JsonWriterOptions
        {
            SkipValidation = true,
            Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
        });
        for (int number = 0; !rest.IsEmpty;)
        {
            int first = line;
            if (!Record(ref rest, separator, cells, ref line))
                throw new InputException($"{path}: line {first}: a quote is opened and never "
                    + "closed");
            // A blank line is no row, but for a table of one column, where it is an empty cell.
            if (cells is [{ Length: 0 }] && names is not { Length: 1 }) continue;
            if (names is null)
            {
                names = [.. cells.Select(cell => Encoding.UTF8.GetString(cell).Trim())];
                if (names.Length == 1 && names[0].Contains(';'))
                    throw new InputException($"{path}: its columns are separated by semicolons, "
                        + "expected commas");
                if (names.GroupBy(name => name).FirstOrDefault(g => g.Count() > 1) is { } twice)
                    throw new InputException(
                        $"{path}: two columns are called {Messages.Quote(twice.Key)}");
                continue;
            }

            number++;
            if (cells.Count != names.Length)
            {
                refuse(number, $"has {cells.Count} cells, the table has {names.Length} columns");
                continue;
            }

            row.Clear();
            json.Reset();
            json.WriteStartObject();
            for (int i = 0; i < names.Length; i++)
                if (cells[i].Length > 0) json.WriteString(names[i], cells[i]);
            json.WriteEndObject();
            json.Flush();
            add(number, row.WrittenMemory);
        }
    }

    // One record, over the line ends inside its quotes; false if a quote stays open.
    private static bool Record(
        ref ReadOnlySpan<byte> rest, byte separator, List<byte[]> cells, ref int line)
    {
        cells.Clear();
        var text = new ArrayBufferWriter<byte>();
        while (true)
        {
            if (!rest.IsEmpty && rest[0] == '"')
            {
                rest = rest[1..];
                while (true)
                {
                    int quote = rest.IndexOf((byte)'"');
                    if (quote < 0) return false;
                    text.Write(rest[..quote]);
                    line += rest[..quote].Count((byte)'\n');
                    rest = rest[(quote + 1)..];
                    if (rest.IsEmpty || rest[0] != '"') break;
                    text.Write("\""u8);
                    rest = rest[1..];
                }
            }

            int end = rest.IndexOfAny(separator, (byte)'\n');
            var cell = end < 0 ? rest : rest[..end];
            bool ends = end < 0 || rest[end] == '\n';
            if (ends && cell.EndsWith("\r"u8)) cell = cell[..^1];
            text.Write(cell);
            cells.Add(text.WrittenSpan.ToArray());
            text.Clear();
            rest = end < 0 ? default : rest[(end + 1)..];
            if (!ends) continue;
            line++;
            return true;
        }
    }
}
