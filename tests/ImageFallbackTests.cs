using System.Buffers.Binary;
using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Pictures where neither libturbojpeg nor libwebp is installed.</summary>
[NonParallelizable]
public class ImageFallbackTests
{
    private static IEnumerable<TestCaseData> Jpegs() =>
        from e in ImageReference.Load("decode.json")
        where e.GetProperty("format").GetString() == "JPEG"
        let name = e.GetProperty("name").GetString()!
        select new TestCaseData(name, e.GetProperty("file").GetString()!)
            .SetName("Without libturbojpeg " + name);

    [SetUp]
    public void Hide() => NativePictureLibrary.Hidden.Value = true;

    [TearDown]
    public void Show() => NativePictureLibrary.Hidden.Value = false;

    /// <summary>
    /// The bars are StbImageSharp's distance from Pillow as measured outside this project: 3 levels
    /// at 4:4:4 and 4:2:0, 11 in grey and at other samplings. It takes the wrong neighbour at the
    /// right edge of 4:2:2, and it smooths colours down the side of pictures of two columns, where
    /// libjpeg does not.
    /// </summary>
    [TestCaseSource(nameof(Jpegs))]
    public void JpegsAreNearlyThoseOfPillow(string name, string file)
    {
        string path = Path.Combine(ImageReference.Folder, file);
        var info = PictureDecoder.Probe(path);
        if (info.Kind == "JPEG CMYK")
        {
            var error = Assert.Throws<InputException>(() => PictureDecoder.Decode(path))!;
            Assert.That(error.Message, Does.StartWith(path + ": is a JPEG picture with four")
                .And.Contains("libturbojpeg"));
            return;
        }

        using var picture = PictureDecoder.Decode(path);
        NativePictureLibrary.Hidden.Value = false;
        if (JpegDecoder.Fallback != null) Assert.Ignore("libturbojpeg is not installed");
        using var expected = PictureDecoder.Decode(path);
        Assert.That(picture.Size, Is.EqualTo(expected.Size));
        bool narrow = picture.Width <= 4 && info.Kind != "JPEG 4:4:4";
        int bar = narrow ? 55 : info.Kind is "JPEG 4:4:4" or "JPEG 4:2:0" or "JPEG 4:2:2" ? 3 : 11;
        int edge = info.Kind == "JPEG 4:2:2" ? ((picture.Width + 1) / 2 * 2) - 2 : -1;
        for (int i = 0; i < picture.Rgb.Length; i++)
        {
            int x = i / 3 % picture.Width;
            Assert.That(Math.Abs(picture.Rgb[i] - expected.Rgb[i]),
                Is.LessThanOrEqualTo(x == edge ? 131 : bar), $"{info.Kind}, byte {i}, column {x}");
        }
    }

    [Test]
    public void WebPNamesItsPackage()
    {
        var error = Assert.Throws<InputException>(() => PictureDecoder.Decode(
            Path.Combine(ImageReference.Folder, "decode", "webp-lossy.webp")))!;
        Assert.That(error.Message, Does.Contain("needs libwebp")
            .And.Contains("apt install libwebp7").And.Contains("convert"));
    }

    /// <summary>Each makes StbImageSharp loop, stop half-way, or keep memory as it was.</summary>
    [TestCase("jpeg-restart", "restart markers")]
    [TestCase("jpeg-420-q75", "cut off")]
    [TestCase("jpeg-own-420-scans", "no pixels")]
    [TestCase("jpeg-420-q75-prog", "refined before")]
    public void WhatLeavesPixelsUndefinedIsRefused(string name, string expected)
    {
        byte[] file = File.ReadAllBytes(
            Path.Combine(ImageReference.Folder, "decode", name + ".jpg"));
        byte[] damaged = name switch
        {
            "jpeg-restart" => Without(file, 0xd0, 2),
            "jpeg-420-q75" => file[..^2],
            _ => Without(file, 0xda, ScanLength(file)),
        };
        var error = Assert.Throws<InputException>(() =>
            PictureDecoder.Decode(damaged, damaged.Length, "x"))!;
        Assert.That(error.Message, Does.StartWith("x: damaged JPEG: ").And.Contains(expected));
    }

    [Test]
    public void EndlessSkipsEnd()
    {
        byte[] file = [0xff, 0xd8, 0xff, 0xe0, 0xff, 0xff];
        var size = new PictureSize(1, 1);
        var source = new ByteSource(file, file.Length, "x");
        var stream = new PictureStream(file, file.Length);
        Assert.Throws<InputException>(() => StbDecoder.Decode(source, "JPEG", stream, size));
        Assert.That(stream.Position, Is.EqualTo(stream.Length));
        stream.Position = -5;
        Assert.That(stream.Position, Is.Zero);
    }

    [Test]
    public void ArithmeticCodingAndLargePicturesAreRefusedByName()
    {
        byte[] frame = [0xff, 0xc9, 0, 11, 8, 0, 9, 0, 9, 1, 1, 0x11, 0];
        byte[] file = [0xff, 0xd8, .. frame, 0xff, 0xda, 0, 8, 1, 1, 0, 0, 63, 0, 0xff, 0xd9];
        Assert.That(Refusal(file), Does.Contain("arithmetic coding").And.Contains("libturbojpeg"));

        byte[] large = new byte[200_000];
        file.CopyTo(large, 0);
        large[3] = 0xc0;
        BinaryPrimitives.WriteInt16BigEndian(large.AsSpan(7), 9000);
        BinaryPrimitives.WriteInt16BigEndian(large.AsSpan(9), 9000);
        Assert.That(Refusal(large), Does.Contain("9000x9000").And.Contains("67108864"));
    }

    /// <summary>The rows are checked and trained on all the same; one line says what is
    /// different.</summary>
    [Test]
    public void DataWithJpegsIsReadAndTheDifferenceIsSaid()
    {
        string folder = Directory.CreateTempSubdirectory().FullName;
        try
        {
            string[] files = ["jpeg-420-q75.jpg", "jpeg-422-q75.jpg", "jpeg-420-q30.jpg",
                "png-rgb.png", "gif.gif", "bmp-rgb.bmp"];
            var rows = files.Select(f =>
            {
                File.Copy(Path.Combine(ImageReference.Folder, "decode", f),
                    Path.Combine(folder, f));
                return new
                {
                    image = f,
                    conversations = new[]
                    {
                        new { role = "user", content = "<image>\nhi" },
                        new { role = "assistant", content = "yes" },
                    },
                };
            });
            string data = Path.Combine(folder, "rows.json");
            File.WriteAllText(data, JsonSerializer.Serialize(rows));
            TrainArguments arguments = V26.Full with { DataPath = data };
            var said = new List<string>();
            DataRows.Open(data, arguments, V26.Format, said.Add);
            Assert.That(said, Has.Count.EqualTo(1));
            Assert.That(said[0], Does.Contain("JPEG pictures: 3").And.Contains("StbImageSharp"));

            var report = new StringWriter();
            Assert.That(DataCheck.Run(arguments, V26.Format, report), report.ToString());
            Assert.That(report.ToString(),
                Does.Contain("kinds of pictures: 2 JPEG 4:2:0, 1 BMP, 1 GIF, 1 JPEG 4:2:2, 1 PNG")
                    .And.Contains("JPEG pictures: 3, read by StbImageSharp"));

            NativePictureLibrary.Hidden.Value = false;
            if (JpegDecoder.Fallback != null) Assert.Ignore("libturbojpeg is not installed");
            said.Clear();
            DataRows.Open(data, arguments, V26.Format, said.Add);
            Assert.That(said, Is.Empty);
        }
        finally
        {
            Directory.Delete(folder, true);
        }
    }

    private static string Refusal(byte[] file) => Assert.Throws<InputException>(() =>
        PictureDecoder.Decode(file, file.Length, "x"))!.Message;

    private static byte[] Without(byte[] file, int marker, int length)
    {
        int at = file.AsSpan().IndexOf((ReadOnlySpan<byte>)[0xff, (byte)marker]);
        return [.. file[..at], .. file[(at + length)..]];
    }

    // From the first scan's marker to the next one that is no restart marker.
    private static int ScanLength(byte[] file)
    {
        int start = file.AsSpan().IndexOf((ReadOnlySpan<byte>)[0xff, 0xda]), at = start + 2;
        while (file[at] != 0xff || file[at + 1] is 0 or (>= 0xd0 and <= 0xd7)) at++;
        return at - start;
    }
}
