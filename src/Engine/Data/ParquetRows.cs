using System.Buffers;
using System.Collections;
using System.Runtime.InteropServices;
using System.Text.Encodings.Web;
using System.Text.Json;
using Parquet;
using Parquet.Serialization;

namespace MiniCpmNative.Engine.Data;

/// <summary>Rows of a Parquet file, one group of them after the other; nulls are absent.</summary>
internal static class ParquetRows
{
    public static bool Accepts(ReadOnlySpan<byte> bytes) => bytes.StartsWith("PAR1"u8);

    /// <param name="path">The file, for messages.</param>
    /// <param name="bytes">Its content.</param>
    /// <param name="add">Takes each row's number, from 1, and the row as JSON.</param>
    /// <exception cref="InputException">It is damaged, or has types that are no row's.</exception>
    public static void Read(
        string path, ReadOnlyMemory<byte> bytes, Action<int, ReadOnlyMemory<byte>> add)
    {
        if (!bytes.Span.EndsWith("PAR1"u8))
            throw new InputException($"{path}: is a Parquet file without its end; copy it again");
        if (!ParquetStructure.IsSound(bytes.Span)) throw Damaged(path, null);
        var row = new ArrayBufferWriter<byte>();
        // What the default escapes, as all but ASCII, the reader behind would have to undo.
        using var json = new Utf8JsonWriter(row, new JsonWriterOptions
        {
            SkipValidation = true,
            Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
        });
        int number = 0;
        using var stream = Stream(bytes);
        ParquetReader file = Guard(
            path, () => ParquetReader.CreateAsync(stream).GetAwaiter().GetResult());
        for (int group = 0; group < file.RowGroupCount; group++)
        {
            int at = group;
            using ParquetColumns? columns = Guard(path, () => ParquetColumns.Read(file, at));
            if (columns is null)
            {
                foreach (var fields in Guard(path, () => Group(bytes, at)))
                    Add(() => Write(json, fields, 0));
                continue;
            }

            for (long left = file.RowGroups[group].RowCount; left > 0; left--)
                Add(() => Guard(path, () =>
                {
                    columns.Write(json);
                    return true;
                }));
        }

        void Add(Func<bool> write)
        {
            row.Clear();
            json.Reset();
            if (!write())
                throw new InputException($"{path}: row {number + 1} has a column of a type that is "
                    + "not read here: write it as texts, numbers, lists or structures of them");
            json.Flush();
            add(++number, row.WrittenMemory);
        }
    }

    // Maps, and lists as old writers have them.
    private static IList<Dictionary<string, object>> Group(ReadOnlyMemory<byte> bytes, int index)
    {
        using var stream = Stream(bytes);
        return ParquetSerializer.DeserializeUntypedAsync(stream, rowGroupIndex: index)
            .GetAwaiter().GetResult().Data;
    }

    private static WithAnEnd Stream(ReadOnlyMemory<byte> bytes) =>
        new(MemoryMarshal.TryGetArray(bytes, out var array) ? array : bytes.ToArray());

    // The library fails on damaged files in any way there is.
    private static T Guard<T>(string path, Func<T> read)
    {
        try
        {
            return read();
        }
        catch (Exception failure)
        {
            throw Damaged(path, failure);
        }
    }

    private static InputException Damaged(string path, Exception? failure) => new(
        $"{path}: cannot be read as Parquet: it is damaged, or of a kind that is not read here; "
        + "write it anew, or as .jsonl", failure);

    private static bool Write(Utf8JsonWriter json, object? value, int depth)
    {
        const int mostDepth = 30;
        switch (value)
        {
            case null: json.WriteNullValue(); return true;
            case string text: json.WriteStringValue(text); return true;
            case ReadOnlyMemory<char> text: json.WriteStringValue(text.Span); return true;
            case byte[] data: json.WriteBase64StringValue(data); return true;
            case ReadOnlyMemory<byte> data: json.WriteBase64StringValue(data.Span); return true;
            case bool flag: json.WriteBooleanValue(flag); return true;
            case double or float:
                double number = Convert.ToDouble(value);
                if (double.IsFinite(number)) json.WriteNumberValue(number);
                else json.WriteNullValue();
                return true;
            case sbyte or byte or short or ushort or int or uint or long:
                json.WriteNumberValue(Convert.ToInt64(value));
                return true;
            case IDictionary members when depth < mostDepth:
                json.WriteStartObject();
                foreach (DictionaryEntry member in members)
                {
                    // Absent, as a key that a JSON row does not have.
                    if (member.Value is null) continue;
                    json.WritePropertyName((string)member.Key);
                    if (!Write(json, member.Value, depth + 1)) return false;
                }

                json.WriteEndObject();
                return true;
            case IEnumerable items when depth < mostDepth:
                json.WriteStartArray();
                foreach (object? item in items)
                    if (!Write(json, item, depth + 1)) return false;
                json.WriteEndArray();
                return true;
            default:
                // Dates and the like are nothing that a row has use for, but under a key of its own
                // they harm no one.
                if (value is not IFormattable) return false;
                json.WriteNullValue();
                return true;
        }
    }

    // To the library the byte behind the last is one more of a number, for ever.
    private sealed class WithAnEnd(ArraySegment<byte> bytes)
        : MemoryStream(bytes.Array!, bytes.Offset, bytes.Count, writable: false)
    {
        public override int ReadByte() =>
            base.ReadByte() is >= 0 and var next ? next : throw new EndOfStreamException();
    }
}
