using System.Buffers.Binary;
using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

public class ImageTests
{
    private static IEnumerable<TestCaseData> Decoded() =>
        from e in ImageReference.Load("decode.json")
        select new TestCaseData(e).SetName("Decodes " + e.GetProperty("name").GetString());

    private static IEnumerable<TestCaseData> Broken() =>
        from e in ImageReference.Load("broken.json")
        let file = e.GetProperty("file").GetString()!
        select new TestCaseData(file, e).SetName("Judges " + file);

    private static IEnumerable<TestCaseData> Corners() =>
        from e in ImageReference.Corners()
        select new TestCaseData(e).SetName("Corner " + e.GetProperty("name").GetString());

    private static string PathOf(JsonElement e) =>
        Path.Combine(ImageReference.Folder, e.GetProperty("file").GetString()!);

    private static (int, int, string) Facts(JsonElement e) =>
        (e.GetProperty("width").GetInt32(), e.GetProperty("height").GetInt32(),
            e.GetProperty("sha256").GetString()!);

    private static (int, int, string) Facts(Picture p) =>
        (p.Width, p.Height, ImageReference.Hash(p.Rgb));

    [TestCaseSource(nameof(Decoded))]
    public void DecodesAsPillow(JsonElement e)
    {
        string path = PathOf(e), format = e.GetProperty("format").GetString()!;
        if (format is "TIFF" or "PPM")
        {
            var refused = Assert.Throws<InputException>(() => PictureDecoder.Decode(path))!;
            string kind = format == "PPM" ? "PBM, PGM, PPM" : format;
            Assert.That(refused.Message,
                Does.StartWith(path).And.Contains(kind).And.Contains("convert"));
            return;
        }

        using var picture = PictureDecoder.Decode(path);
        Assert.That(Facts(picture), Is.EqualTo(Facts(e)));

        var info = PictureDecoder.Probe(path);
        Assert.That(info.Size, Is.EqualTo(picture.Size));
        Assert.That(info.Format.ToString(), Is.EqualTo(format).IgnoreCase);
        using var turned = picture.Oriented(info.Orientation);
        Assert.That(Facts(turned),
            Is.EqualTo(Facts(e.TryGetProperty("exif", out var exif) ? exif : e)));
    }

    [TestCaseSource(nameof(Broken))]
    public void AcceptsAndRefusesAsPillow(string file, JsonElement e)
    {
        string path = PathOf(e);
        if (e.GetProperty("ok").GetBoolean())
        {
            using var picture = PictureDecoder.Decode(path);
            bool inexact = e.TryGetProperty("note", out _);
            var (got, expected) = (Facts(picture), Facts(e));
            Assert.That(inexact ? got with { Item3 = "" } : got,
                Is.EqualTo(inexact ? expected with { Item3 = "" } : expected));
            return;
        }

        var error = Assert.Throws<InputException>(() => PictureDecoder.Decode(path))!;
        Assert.That(error.Message, Does.StartWith(path).And.Not.Contains("\n"));
    }

    [TestCase("png-60000x60000.png")]
    [TestCase("png-13000x7000-cut.png")]
    public void AllocatesNothingForPixelsThatAreNotThere(string name)
    {
        string path = Path.Combine(ImageReference.Folder, "broken", name);
        long before = GC.GetAllocatedBytesForCurrentThread();
        Assert.Throws<InputException>(() => PictureDecoder.Decode(path));
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before,
            Is.LessThan(400_000_000 / 100));
    }

    // Two pixels each: one transparent, and one green, in the TGA half transparent.
    [TestCase("GIF", new byte[]
    {
        0x47, 0x49, 0x46, 0x38, 0x39, 0x61, 2, 0, 1, 0, 0x80, 0, 0, 200, 0, 0, 0, 255, 0,
        0x21, 0xf9, 4, 1, 0, 0, 0, 0, 0x2c, 0, 0, 0, 0, 2, 0, 1, 0, 0, 2, 2, 0x44, 0x0a, 0, 0x3b,
    }, new byte[] { 200, 0, 0, 0, 255, 0 }, new byte[] { 255, 255, 255, 0, 255, 0 })]
    [TestCase("x.tga", new byte[]
    {
        0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 32, 0x28, 0, 0, 200, 0, 0, 255, 0, 128,
    }, new byte[] { 200, 0, 0, 0, 255, 0 }, new byte[] { 255, 255, 255, 127, 255, 127 })]
    public void WhatIsTransparentIsDroppedOrLaidOverWhite(
        string name, byte[] file, byte[] dropped, byte[] laid)
    {
        using Picture plain = PictureDecoder.Decode(file, name);
        using Picture white = PictureDecoder.Decode(file, name, overWhite: true);
        Assert.That(plain.Rgb.ToArray(), Is.EqualTo(dropped));
        Assert.That(white.Rgb.ToArray(), Is.EqualTo(laid));
    }

    [Test]
    public void DevicesAndPipesAreNotOpened()
    {
        if (!File.Exists("/dev/zero")) Assert.Ignore("no /dev/zero here");
        Assert.Throws<InputException>(() => PictureDecoder.Decode("/dev/zero"));
    }

    [TestCase("is a PDF", "%PDF-1.4")]
    [TestCase("is an AVIF picture", "\0\0\0 ftypavif....", "avifdec")]
    [TestCase("is an AVIF picture", "\0\0\0 ftypmif1....mif1avifmiaf....", "avifdec")]
    [TestCase("is a HEIC picture", "\0\0\0 ftypheic....", "heif-convert")]
    [TestCase("is a HEIC picture", "\0\0\0\u001cftypmif1....mif1heic....", "heif-convert")]
    [TestCase("is a video", "\0\0\0 ftypisom\0\0\u0002\0isomiso2avc1mp41", "ffmpeg")]
    [TestCase("is a video", "\0\0\0\u0014ftypqt  \0\0\u0002\0qt  ", "ffmpeg")]
    [TestCase("is a video", "\x1a\x45\xdf\xa3....webm", "ffmpeg")]
    [TestCase("is a video", "RIFF....AVI LIST....", "ffmpeg")]
    [TestCase("is a TIFF picture", "II*\0\x08\0\0\0", "magick")]
    [TestCase("is an SVG", "<?xml version='1.0'?><svg xmlns=''>")]
    [TestCase("is an HTML", "<!DOCTYPE html><html>")]
    [TestCase("is a PBM", "P6 3 4 255 ...")]
    [TestCase("is no picture", "hello")]
    public void ForeignFormatsAreNamed(string expected, string content, string way = "")
    {
        byte[] bytes = System.Text.Encoding.Latin1.GetBytes(content);
        var error = Assert.Throws<InputException>(() =>
            PictureDecoder.Decode(bytes, bytes.Length, "a.bin"))!;
        Assert.That(error.Message, Does.StartWith("a.bin: " + expected).And.Contains(way));
    }

    /// <summary>
    /// GIF, BMP and TGA files of a few bytes each, for what the reference pictures do not have;
    /// made and read with Pillow 9.4. (Where indices go beyond a palette it differs from the later
    /// ones that the reference is of, and those files are left out.)
    /// </summary>
    [TestCaseSource(nameof(Corners))]
    public void CornersAreReadAsByPillow(JsonElement e)
    {
        byte[] file = e.GetProperty("file").GetBytesFromBase64();
        if (e.TryGetProperty("error", out _))
        {
            var error = Assert.Throws<InputException>(() =>
                PictureDecoder.Decode(file, file.Length, "x.tga"))!;
            Assert.That(error.Message, Does.StartWith("x.tga: damaged "));
            return;
        }

        using var picture = PictureDecoder.Decode(file, file.Length, "x.tga");
        Assert.That(Facts(picture), Is.EqualTo(Facts(e)));
    }

    [TestCase("is a BMP picture with run lengths", 14, 30, 1)]
    [TestCase("damaged BMP: has 5 bits per pixel", 14, 28, 5)]
    [TestCase("is a BMP picture of 16 bits with the colour masks", 3, 30, 3)]
    [TestCase("has 4294967295x1 pixels", 24, 18, -1)]
    public void BitmapsThatAreNotReadAreRefusedByName(string expected, int bits, int at, int value)
    {
        byte[] file = new byte[200];
        "BM"u8.CopyTo(file);
        BinaryPrimitives.WriteInt32LittleEndian(file.AsSpan(14), 40);
        BinaryPrimitives.WriteInt32LittleEndian(file.AsSpan(18), 1);
        BinaryPrimitives.WriteInt32LittleEndian(file.AsSpan(22), 1);
        file[28] = bits == 24 ? (byte)24 : (byte)16;
        BinaryPrimitives.WriteInt32LittleEndian(file.AsSpan(at), value);
        var error = Assert.Throws<InputException>(() =>
            PictureDecoder.Decode(file, file.Length, "x"))!;
        Assert.That(error.Message, Does.StartWith("x: " + expected));
    }

    /// <summary>
    /// A picture at the pixel limit in hundreds of progressive scans of a few bytes each would take
    /// minutes. A usual progressive picture has 10 scans of 14 components in all (libjpeg's
    /// script).
    /// </summary>
    [Test]
    public void ScansAreBounded()
    {
        byte[] frame = [0xff, 0xca, 0, 11, 8, 0x34, 0x41, 0x34, 0x41, 1, 1, 0x11, 0];
        byte[] scan = [0xff, 0xda, 0, 8, 1, 1, 0, 0, 0, 0x10];
        byte[] file = [0xff, 0xd8, .. frame, .. Enumerable.Repeat(scan, 490).SelectMany(s => s),
            0xff, 0xd9];
        var error = Assert.Throws<InputException>(() =>
            PictureDecoder.Decode(file, file.Length, "x"))!;
        Assert.That(error.Message, Does.Contain("scans").And.Contains("13377x13377"));

        byte[] usual = File.ReadAllBytes(
            Path.Combine(ImageReference.Folder, "decode", "jpeg-420-q75-prog.jpg"));
        var source = new ByteSource(usual, usual.Length, "x");
        var header = new JpegHeader(source);
        var scans = new JpegScans(header, source, usual);
        Assert.That(scans.Samples, Is.EqualTo(14L * header.Width * header.Height));
        Assert.That(scans.End, Is.EqualTo(usual.Length));
    }

    /// <summary>
    /// A warning (junk in front of a segment) alone is passed over; followed by an error (a Huffman
    /// table of 4080 codes) the file is refused. libturbojpeg reports both as warnings.
    /// </summary>
    [Test]
    public void JpegErrorsBehindWarningsAreSeen()
    {
        byte[] whole =
            File.ReadAllBytes(Path.Combine(ReferenceFile.Root, "images/decode/jpeg-444-q75.jpg"));
        int tables = whole.AsSpan().IndexOf((ReadOnlySpan<byte>)[0xff, 0xdb]);
        byte[] junk = [.. whole[..tables], 1, 2, 3, .. whole[tables..]];
        using var expected = PictureDecoder.Decode(whole, whole.Length, "whole");
        using var picture = PictureDecoder.Decode(junk, junk.Length, "junk");
        Assert.That(Facts(picture), Is.EqualTo(Facts(expected)));

        junk.AsSpan(junk.AsSpan().IndexOf((ReadOnlySpan<byte>)[0xff, 0xc4]) + 5, 16).Fill(255);
        var error = Assert.Throws<InputException>(() =>
            PictureDecoder.Decode(junk, junk.Length, "junk"))!;
        Assert.That(error.Message, Does.StartWith("junk: damaged JPEG: "));
    }

    [Test]
    public void OrientationsComposeToTheIdentity()
    {
        using var picture = ImageReference.Formula(5, 3, 1);
        foreach (var (turn, back)
            in new[] { (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 7), (8, 6) })
        {
            using var turned = picture.Oriented(turn);
            using var restored = turned.Oriented(back);
            Assert.That(Facts(restored), Is.EqualTo(Facts(picture)), $"{turn} then {back}");
        }
    }

    /// <summary>The pictures of the reference data set.</summary>
    [Test]
    public void DataSetPicturesAndTiles()
    {
        string data = Path.Combine(ReferenceText.Root, "v26", "data");
        foreach (var e in ReferenceText.Json("v26/data/images.json").EnumerateArray())
        {
            using var picture =
                PictureDecoder.Decode(Path.Combine(data, e.GetProperty("file").GetString()!));
            string expected = e.GetProperty("rgb_sha256").GetString()!;
            Assert.That(ImageReference.Hash(picture.Rgb), Is.EqualTo(expected));
        }

        var files = ReferenceText.Json("v26/data/rows.json").EnumerateArray().ToDictionary(
            r => r.GetProperty("id").GetString()!, r => r.GetProperty("image").Clone());
        var dataset = ReferenceText.Json("v26/data/dataset.json");
        int compared = 0;
        foreach (string setting in (string[])["slices9", "slices4", "slices1", "slices2_short"])
        {
            var part = dataset.GetProperty(setting);
            int slices = part.GetProperty("max_slice_nums").GetInt32();
            foreach (var row in part.GetProperty("rows").EnumerateArray())
            {
                if (!row.TryGetProperty("tiles", out var tiles)) continue;
                var image = files[row.GetProperty("id").GetString()!];
                string[] paths = image.ValueKind == JsonValueKind.String
                    ? [image.GetString()!]
                    : [.. image.EnumerateObject().Select(p => p.Value.GetString()!)];
                var got = paths.SelectMany(p => Tiles(Path.Combine(data, p), slices)).ToArray();
                var expected = tiles.EnumerateArray()
                    .Select(t => t.GetProperty("rgb_sha256").GetString()!).ToArray();
                Assert.That(got, Is.EqualTo(expected), row.GetProperty("id").GetString());
                compared += got.Length;
            }
        }

        Assert.That(compared, Is.GreaterThan(20));
    }

    private static IEnumerable<string> Tiles(string path, int slices)
    {
        using var picture = PictureDecoder.Decode(path);
        var plan = Slicer.Plan(picture.Size, slices);
        return [.. PatchStripTests.Views(picture, plan).Select(v => ImageReference.Hash(v.Rgb))];
    }
}
