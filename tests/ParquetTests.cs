using System.Buffers;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.Json.Serialization;
using MiniCpmNative.Engine.Data;
using NUnit.Framework;
using Parquet;
using Parquet.Serialization;

namespace MiniCpmNative.Tests;

/// <summary>
/// Rows put together from the columns of Parquet files are those that were written, whatever is
/// null or empty in them.
/// </summary>
[TestFixture]
public sealed class ParquetTests
{
    private static readonly JsonSerializerOptions s_withoutNulls =
        new() { DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull };

    // RowFormatTests have what stands in these; here it is that they are read this way.
    [TestCase("messages.parquet", 6)]
    [TestCase("query.parquet", 3)]
    public void FilesOfPyArrowAreReadByTheirColumns(string name, int rows) => Assert.That(
        Rows(File.ReadAllBytes(Path.Combine(ReferenceFile.Root, "formats", "data", name))),
        Has.Count.EqualTo(rows));

    [Test]
    public void NullsAndEmptyListsStandWhereTheyAre()
    {
        var random = new Random(5);
        T? Maybe<T>(Func<T> made) where T : class => random.Next(3) == 0 ? null : made();
        List<T> Some<T>(Func<T> made) =>
            [.. Enumerable.Range(0, random.Next(4)).Select(_ => made())];
        string Word() => $"w{random.Next(100)}\n\"é😀<";
        Turn Said() => new() { Role = Maybe(Word), Parts = Maybe(() => Some(Word)) };
        Record[] records = [.. Enumerable.Range(0, 300).Select(i => new Record
        {
            Number = i,
            Made = new DateTime(2024, 1, 1 + (i % 28), 0, 0, 0, DateTimeKind.Utc),
            Share = random.Next(3) == 0 ? null : random.NextDouble(),
            Flag = i % 3 == 0,
            Text = Maybe(Word),
            Bytes = Maybe(() => Encoding.UTF8.GetBytes(Word())),
            Names = Maybe(() => Some(Word)),
            Turns = Maybe(() => Some(Said)),
            Boxes = Maybe(() => Some(() => Some(() => random.Next(9)))),
            Inner = Maybe(Said),
        })];
        using var stream = new MemoryStream();
        ParquetSerializer.SerializeAsync(records, stream, new ParquetOptions { RowGroupSize = 97 })
            .GetAwaiter().GetResult();
        var rows = Rows(stream.ToArray());
        Assert.That(rows, Has.Count.EqualTo(records.Length));
        foreach (var (record, row) in records.Zip(rows))
        {
            var expected = JsonSerializer.SerializeToNode(record, s_withoutNulls)!.AsObject();
            // A date is nothing that a row has use for.
            expected["Made"] = null;
            Assert.That(JsonNode.DeepEquals(JsonNode.Parse(row), expected), Is.True,
                $"{row} is not {expected.ToJsonString()}");
        }
    }

    private static List<string> Rows(byte[] file)
    {
        using var stream = new MemoryStream(file);
        ParquetReader reader = ParquetReader.CreateAsync(stream).GetAwaiter().GetResult();
        var rows = new List<string>();
        for (int group = 0; group < reader.RowGroupCount; group++)
        {
            using var columns = ParquetColumns.Read(reader, group);
            Assert.That(columns, Is.Not.Null);
            for (long left = reader.RowGroups[group].RowCount; left > 0; left--)
                rows.Add(Json(columns!.Write));
        }

        return rows;
    }

    private static string Json(Action<Utf8JsonWriter> write)
    {
        var bytes = new ArrayBufferWriter<byte>();
        using (var json = new Utf8JsonWriter(bytes)) write(json);
        return Encoding.UTF8.GetString(bytes.WrittenSpan);
    }

    private sealed class Record
    {
        public int Number { get; set; }
        public DateTime Made { get; set; }
        public double? Share { get; set; }
        public bool Flag { get; set; }
        public string? Text { get; set; }
        public byte[]? Bytes { get; set; }
        public List<string>? Names { get; set; }
        public List<Turn>? Turns { get; set; }
        public List<List<int>>? Boxes { get; set; }
        public Turn? Inner { get; set; }
    }

    private sealed class Turn
    {
        public string? Role { get; set; }
        public List<string>? Parts { get; set; }
    }
}
