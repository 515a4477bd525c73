using System.Buffers;
using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine.Data;
using NUnit.Framework;
using Parquet;
using Parquet.Serialization;

namespace MiniCpmNative.Tests;

/// <summary>
/// Rows put together from the columns of Parquet files are those that the library's own records
/// are, which it makes an object at a time.
/// </summary>
[TestFixture]
public sealed class ParquetTests
{
    [TestCase("messages.parquet")]
    [TestCase("query.parquet")]
    public void FilesOfPyArrowAreReadByTheirColumns(string name) => Same(File.ReadAllBytes(
        Path.Combine(ReferenceFile.Root, "formats", "data", name)));

    [Test]
    public void NullsAndEmptyListsStandWhereTheyAre()
    {
        var random = new Random(5);
        T? Maybe<T>(Func<T> made) where T : class => random.Next(3) == 0 ? null : made();
        List<T> Some<T>(Func<T> made) => [.. Enumerable.Range(0, random.Next(4)).Select(_ => made())];
        string Word() => $"w{random.Next(100)}\n\"é😀<";
        using var stream = new MemoryStream();
        ParquetSerializer.SerializeAsync(Enumerable.Range(0, 300).Select(i => new Record
        {
            Number = i,
            Made = new DateTime(2024, 1, 1 + (i % 28), 0, 0, 0, DateTimeKind.Utc),
            Share = random.Next(3) == 0 ? null : random.NextDouble(),
            Flag = i % 3 == 0,
            Text = Maybe(Word),
            Bytes = Maybe(() => Encoding.UTF8.GetBytes(Word())),
            Names = Maybe(() => Some(Word)),
            Turns = Maybe(() => Some(() => new Turn { Role = Maybe(Word), Parts = Maybe(() => Some(Word)) })),
            Boxes = Maybe(() => Some(() => Some(() => random.Next(9)))),
            Inner = Maybe(() => new Turn { Role = Maybe(Word), Parts = Maybe(() => Some(Word)) }),
        }), stream, new ParquetOptions { RowGroupSize = 97 }).GetAwaiter().GetResult();
        Same(stream.ToArray());
    }

    private static void Same(byte[] file)
    {
        using var stream = new MemoryStream(file);
        ParquetReader reader = ParquetReader.CreateAsync(stream).GetAwaiter().GetResult();
        int rows = 0;
        for (int group = 0; group < reader.RowGroupCount; group++)
        {
            using var columns = ParquetColumns.Read(reader, group);
            Assert.That(columns, Is.Not.Null);
            foreach (var record in ParquetSerializer.DeserializeUntypedAsync(
                new MemoryStream(file), rowGroupIndex: group).GetAwaiter().GetResult().Data)
            {
                Assert.That(Json(columns!.Write), Is.EqualTo(
                    Json(json => ParquetRows.Write(json, record, 0))), $"row {rows}");
                rows++;
            }
        }

        Assert.That(rows, Is.GreaterThan(2));
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
