using System.Buffers.Binary;
using System.Diagnostics;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Images;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Damaged pictures: each one decodes or is refused with one line, soon, and without memory that
/// the file could not fill. The seed and number of a mutation stand in every failure.
/// </summary>
public class ImageMutationTests
{
    private const int LargestFile = 3_000;

    [TestCase("*.png", 4000)]
    [TestCase("*.jpg", 4000)]
    [TestCase("*.webp", 4000)]
    [TestCase("*.gif", 1000)]
    [TestCase("*.bmp", 3000)]
    [TestCase("*.tga", 3000)]
    public void MutatedPicturesAreDecodedOrRefused(string kind, int mutations) =>
        Mutate(kind, mutations);

    /// <summary>JPEG through the decoder that needs nothing installed.</summary>
    [Test]
    public void MutatedPicturesAreDecodedOrRefusedWithoutLibraries()
    {
        NativePictureLibrary.Hidden.Value = true;
        try
        {
            Mutate("*.jpg", 4000);
        }
        finally
        {
            NativePictureLibrary.Hidden.Value = false;
        }
    }

    private static void Mutate(string kind, int mutations)
    {
        byte[][] seeds = Seeds(kind);
        Assert.That(seeds, Has.Length.GreaterThan(5));
        var random = new Random(2026 + kind[2]);
        string name = "mutated" + kind[1..];
        int decoded = 0, refused = 0;
        for (int i = 0; i < mutations; i++)
        {
            byte[] file = Mutate(seeds[i % seeds.Length], random);
            long before = GC.GetAllocatedBytesForCurrentThread(), start = Stopwatch.GetTimestamp();
            long pixels = 0;
            try
            {
                using var picture = PictureDecoder.Decode(file, file.Length, name);
                pixels = (long)picture.Width * picture.Height;
                if (NativePictureLibrary.Hidden.Value) Repeats(file, name, picture, i);
                decoded++;
            }
            catch (InputException e)
            {
                Assert.That(e.Message, Does.StartWith(name + ": ").And.Not.Contains("\n"),
                    $"number {i}");
                Assert.That(e.Message, Does.Not.Contain("Exception"), $"number {i}");
                refused++;
            }

            long allocated = GC.GetAllocatedBytesForCurrentThread() - before;

            // A lossless WebP of one colour needs no data per pixel, nor does what a GIF's frame
            // leaves free: only the pixel limits hold there.
            long most = kind switch
            {
                "*.webp" or "*.gif" => 3 * PictureDecoder.MaxPixels,
                _ => 4_000_000 + (4_096L * file.Length),
            };
            Assert.That(allocated, Is.LessThan(most),
                $"number {i}, {file.Length} bytes, {pixels} pixels");
            Assert.That(Stopwatch.GetElapsedTime(start).TotalSeconds, Is.LessThan(10),
                $"number {i}");
            if (kind == "*.png")
                Assert.That(PngTests.Outcome(file, streamed: true),
                    Is.EqualTo(PngTests.Outcome(file, streamed: false)),
                    $"number {i}, without libdeflate");
        }

        Assert.That(decoded, Is.GreaterThan(mutations / 40), "some survive");
        Assert.That(refused, Is.GreaterThan(mutations / 10), "most do not");
    }

    // Pixels that the decoder left as memory was would change with what was in it.
    private static void Repeats(byte[] file, string name, Picture first, int number)
    {
        using (PictureDecoder.Decode(
            Path.Combine(ReferenceFile.Root, "images/decode/jpeg-444-q30.jpg")))
        using (var again = PictureDecoder.Decode(file, file.Length, name))
            Assert.That(again.Rgb.SequenceEqual(first.Rgb), $"number {number} decodes otherwise");
    }

    // Small files of a kind: reference pictures, and those that were made for the corners.
    private static byte[][] Seeds(string kind)
    {
        string format = kind[2..] + " ";
        var corners = ImageReference.Corners()
            .Where(e => e.GetProperty("name").GetString()!.StartsWith(format))
            .Select(e => e.GetProperty("file").GetBytesFromBase64());
        return
        [
            .. new[] { "decode", "broken" }
                .SelectMany(f =>
                    Directory.GetFiles(Path.Combine(ReferenceFile.Root, "images", f), kind))
                .Order(StringComparer.Ordinal)
                .Select(File.ReadAllBytes)
                .Concat(corners)
                .Where(b => b.Length is > 8 and < LargestFile),
        ];
    }

    private static byte[] Mutate(byte[] seed, Random random)
    {
        byte[] file = [.. seed];
        for (int n = random.Next(1, 4); n > 0 && file.Length > 8; n--)
        {
            // Half of the damage goes to the headers, which matter most.
            int at = random.Next(random.Next(2) == 0 ? Math.Min(file.Length, 64) : file.Length);
            int length = Math.Min(random.Next(1, 40), file.Length - at);
            switch (random.Next(8))
            {
                case 0: file[at] ^= (byte)(1 << random.Next(8)); break;
                case 1: file[at] = (byte)random.Next(256); break;
                case 2: file = file[..at]; break;
                case 3: file = [.. file[..at], .. file[(at + length)..]]; break;
                case 4: file = [.. file[..at], .. file.AsSpan(at, length), .. file[at..]]; break;
                case 5: random.NextBytes(file.AsSpan(at, length)); break;
                case 6 when at + 4 <= file.Length:
                    uint[] extremes =
                        [0, 1, 0x7fffffff, 0x80000000, uint.MaxValue, (uint)file.Length];
                    BinaryPrimitives.WriteUInt32BigEndian(file.AsSpan(at),
                        extremes[random.Next(6)]);
                    break;
                default: file = Reorder(file, random); break;
            }
        }

        // Most PNG damage would end at a checksum; without it the rest of the reader is reached.
        if (random.Next(4) != 0) RepairChecksums(file);
        return file;
    }

    private static byte[] Reorder(byte[] file, Random random)
    {
        int[] cuts = [random.Next(file.Length), random.Next(file.Length), random.Next(file.Length)];
        Array.Sort(cuts);
        return [.. file[..cuts[0]], .. file[cuts[1]..cuts[2]], .. file[cuts[0]..cuts[1]],
            .. file[cuts[2]..]];
    }

    private static void RepairChecksums(byte[] file)
    {
        if (file.Length < 8 || file[0] != 0x89) return;
        for (long at = 8; at + 12 <= file.Length;)
        {
            long end = at + 12 + BinaryPrimitives.ReadUInt32BigEndian(file.AsSpan((int)at));
            if (end > file.Length) return;
            RepairChecksum(file.AsSpan((int)at, (int)(end - at)));
            at = end;
        }
    }
    /// <summary>Writes the checksum of a whole PNG chunk to its end.</summary>
    internal static void RepairChecksum(Span<byte> chunk)
    {
        uint crc = uint.MaxValue;
        foreach (byte b in chunk[4..^4])
        {
            crc ^= b;
            for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (0xedb88320u & (0 - (crc & 1)));
        }

        BinaryPrimitives.WriteUInt32BigEndian(chunk[^4..], ~crc);
    }
}
