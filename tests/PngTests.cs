using System.Buffers.Binary;
using System.IO.Compression;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Images;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>PNG's row filters, and its two ways to inflate, which must not differ.</summary>
public class PngTests
{
    private const int Columns = 40, Rows = 30, Stride = 1 + (3 * Columns);

    private static IEnumerable<string> Files() =>
        new[] { "decode", "broken" }.SelectMany(
            f => Directory.GetFiles(Path.Combine(ImageReference.Folder, f), "*.png"));

    /// <summary>What a file decodes to, or why it is refused.</summary>
    internal static string Outcome(byte[] file, bool streamed)
    {
        try
        {
            using var picture = PictureDecoder.Decode(file, file.Length, "x", streamed);
            return $"{picture.Width}x{picture.Height} {ImageReference.Hash(picture.Rgb)}";
        }
        catch (InputException e)
        {
            return e.Message;
        }
    }

    private static bool InflatesWhole(byte[] file)
    {
        var source = new ByteSource(file, file.Length, "x");
        var header = new PngHeader(source);
        long stored = PngDataStream.Available(header, file.Length);
        long length = PngDecoder.FilteredBytes(header);
        using var pixels = new PngPixels(source, file, header, stored, length, streamed: false);
        return pixels.Whole;
    }

    private static void NeedLibDeflate()
    {
        if (!LibDeflate.Available) Assert.Ignore("libdeflate is not installed");
    }

    [Test]
    public void PicturesAreTheSameWithLibDeflateAndWithout()
    {
        NeedLibDeflate();
        int whole = 0;
        foreach (string path in Files())
        {
            byte[] file = File.ReadAllBytes(path);
            string outcome = Outcome(file, streamed: true);
            Assert.That(Outcome(file, streamed: false), Is.EqualTo(outcome), path);
            bool decoded = !outcome.StartsWith("x: ");
            if (decoded && file.AsSpan().StartsWith(PngHeader.Signature) && InflatesWhole(file))
                whole++;
        }

        Assert.That(whole, Is.GreaterThan(50));
    }

    /// <summary>The zlib stream cut into chunks, followed and cut off in many ways.</summary>
    [Test]
    public void EndsOfTheDataAreJudgedTheSame()
    {
        NeedLibDeflate();
        byte[] rows = FilteredRows();
        byte[] dictionary = [0x78, 0x20, 0, 0, 0, 1, .. Compress(rows)[2..]];
        byte[] data = Compress(rows), small = Compress(rows[..(20 * Stride)]);
        byte[] wrongSum = [.. data[..^1], (byte)(data[^1] ^ 1)];
        var files = new Dictionary<string, (byte[] File, bool Whole, bool Refused)>
        {
            ["one chunk"] = (Png([data]), true, false),
            ["chunks of a byte"] = (Png([.. data.Select(b => (byte[])[b])]), true, false),
            ["empty chunks"] = (Png([[], data[..9], [], [], data[9..], []]), true, false),
            ["checksum apart"] = (Png([data[..^4], data[^4..]]), true, false),
            ["bytes behind the checksum"] = (Png([[.. data, 1, 2, 3], [4, 5]]), true, false),
            ["surplus rows"] = (Png([Compress([.. rows, .. rows])]), false, false),
            ["rows missing"] = (Png([small]), false, false),
            ["half a row missing"] = (Png([Compress(rows[..^60])]), false, true),
            ["no checksum"] = (Png([data[..^4]]), false, false),
            ["wrong checksum"] = (Png([wrongSum]), false, true),
            ["preset dictionary"] = (Png([dictionary]), false, true),
            ["no data"] = (Png([[]]), false, true),
            ["cut"] = (Png([data[..^40]]), false, true),
            ["cut inside the last chunk, behind the data"] =
                (Png([data[..50], [.. data[50..], 1, 2, 3, 4]])[..^18], true, false),
            ["cut inside a chunk that is not needed"] =
                (Png([data, [1, 2, 3, 4, 5, 6, 7, 8]])[..^20], true, true),
            ["unknown filter"] =
                (Png([Compress([.. rows[..Stride], 5, .. rows[(Stride + 1)..]])]), true, true),
        };
        foreach (var (name, (file, whole, refused)) in files)
        {
            string outcome = Outcome(file, streamed: true);
            Assert.That(Outcome(file, streamed: false), Is.EqualTo(outcome), name);
            Assert.That(outcome.StartsWith("x: damaged PNG"), Is.EqualTo(refused),
                $"{name}: {outcome}");
            Assert.That(InflatesWhole(file), Is.EqualTo(whole), name);
        }
    }

    [Test]
    public void LibDeflateInflatesOnlyWholeStreams()
    {
        NeedLibDeflate();
        byte[] plain = FilteredRows(), data = Compress(plain);
        byte[] into = new byte[plain.Length];
        Assert.That(LibDeflate.Inflate([.. data, 1, 2], into), Is.EqualTo(data.Length));
        Assert.That(into, Is.EqualTo(plain));
        Assert.That(LibDeflate.Inflate(data, new byte[plain.Length + 1]), Is.EqualTo(-1),
            "too few");
        Assert.That(LibDeflate.Inflate(data, new byte[plain.Length - 1]), Is.EqualTo(-1),
            "too many");
        Assert.That(LibDeflate.Inflate(data.AsSpan(0, data.Length - 1), into),
            Is.EqualTo(-1), "cut");
        Assert.That(LibDeflate.Inflate([], into), Is.EqualTo(-1), "empty");
    }

    /// <summary>Against the formulas of PNG specification 9.2 and 9.4, byte by byte.</summary>
    [Test]
    public void FiltersAreThoseOfTheSpecification(
        [Values(0, 1, 2, 3, 4)] int filter, [Values(1, 2, 3, 4, 6, 8)] int bytesPerPixel)
    {
        var random = new Random((filter * 10) + bytesPerPixel);
        for (int n = 0; n < 300; n++)
        {
            // Few different values bring ties, all of them overflow.
            int length = random.Next(1, 60) * bytesPerPixel, values = n % 2 == 0 ? 256 : 6;
            byte[] x = Bytes(1 + length), above = Bytes(length), into = Bytes(length);
            byte[] expected = new byte[length];
            x[0] = (byte)filter;
            for (int i = 0; i < length; i++)
            {
                int a = i < bytesPerPixel ? 0 : expected[i - bytesPerPixel], b = above[i];
                int c = i < bytesPerPixel ? 0 : above[i - bytesPerPixel];
                int p = a + b - c, toA = Math.Abs(p - a), toB = Math.Abs(p - b),
                    toC = Math.Abs(p - c);
                int paeth = toA <= toB && toA <= toC ? a : toB <= toC ? b : c;
                int predicted =
                    filter switch { 1 => a, 2 => b, 3 => (a + b) / 2, 4 => paeth, _ => 0 };
                expected[i] = (byte)(x[i + 1] + predicted);
            }

            Assert.That(PngFilters.Undo(x.AsSpan(0, 1 + length), above, into, bytesPerPixel));
            Assert.That(into[..length], Is.EqualTo(expected), $"number {n}");

            byte[] Bytes(int count)
            {
                byte[] bytes = new byte[count + Picture.Slack];
                for (int i = 0; i < bytes.Length; i++)
                    bytes[i] = (byte)(random.Next(values) * (256 / values));
                return bytes;
            }
        }
    }

    // Of two pixels one is transparent, wholly or by half: white, or the mean with it.
    [TestCase(0, new byte[0], new byte[] { 0, 77 }, new byte[] { 77, 78 },
        new byte[] { 255, 255, 255, 78, 78, 78 })]
    [TestCase(2, new byte[0], new byte[] { 0, 1, 0, 2, 0, 3 }, new byte[] { 1, 2, 3, 1, 2, 4 },
        new byte[] { 255, 255, 255, 1, 2, 4 })]
    [TestCase(3, new byte[] { 10, 20, 30, 40, 50, 60 }, new byte[] { 0 }, new byte[] { 0, 1 },
        new byte[] { 255, 255, 255, 40, 50, 60 })]
    [TestCase(4, new byte[0], new byte[0], new byte[] { 9, 0, 9, 255 },
        new byte[] { 255, 255, 255, 9, 9, 9 })]
    [TestCase(6, new byte[0], new byte[0], new byte[] { 0, 100, 255, 128, 7, 8, 9, 255 },
        new byte[] { 127, 177, 255, 7, 8, 9 })]
    public void WhatIsTransparentIsLaidOverWhite(
        byte colour, byte[] palette, byte[] clear, byte[] row, byte[] expected)
    {
        byte[] size = [0, 0, 0, 2, 0, 0, 0, 1, 8, colour, 0, 0, 0];
        byte[] file = [
            .. PngHeader.Signature, .. Chunk("IHDR"u8, size),
            .. palette.Length > 0 ? Chunk("PLTE"u8, palette) : [],
            .. clear.Length > 0 ? Chunk("tRNS"u8, clear) : [],
            .. Chunk("IDAT"u8, Compress([0, .. row])), .. Chunk("IEND"u8, [])];
        using Picture laid = PictureDecoder.Decode(file, "x", overWhite: true);
        Assert.That(laid.Rgb.ToArray(), Is.EqualTo(expected));
        using Picture dropped = PictureDecoder.Decode(file, "x");
        Assert.That(dropped.Rgb.ToArray(), Is.Not.EqualTo(expected));
    }

    private static byte[] FilteredRows()
    {
        byte[] rows = new byte[Rows * Stride];
        new Random(7).NextBytes(rows);
        for (int y = 0; y < Rows; y++) rows[y * Stride] = (byte)(y % 5);
        return rows;
    }

    private static byte[] Compress(byte[] plain)
    {
        var packed = new MemoryStream();
        using (var deflate = new ZLibStream(packed, CompressionLevel.Optimal)) deflate.Write(plain);
        return packed.ToArray();
    }

    // Checksums are looked at only in front of the data.
    private static byte[] Png(byte[][] data)
    {
        byte[] size = [0, 0, 0, Columns, 0, 0, 0, Rows, 8, 2, 0, 0, 0];
        var file = new List<byte>([.. PngHeader.Signature, .. Chunk("IHDR"u8, size)]);
        foreach (byte[] part in data) file.AddRange(Chunk("IDAT"u8, part));
        return [.. file, .. Chunk("IEND"u8, [])];
    }

    private static byte[] Chunk(ReadOnlySpan<byte> type, byte[] data)
    {
        byte[] chunk = [0, 0, 0, 0, .. type, .. data, 0, 0, 0, 0];
        BinaryPrimitives.WriteInt32BigEndian(chunk, data.Length);
        ImageMutationTests.RepairChecksum(chunk);
        return chunk;
    }
}
