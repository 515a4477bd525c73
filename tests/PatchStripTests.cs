using System.Runtime.InteropServices;
using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Resizing, slicing and patches, against Pillow and the official processors.</summary>
public class PatchStripTests
{
    private static readonly float[] s_half = [0.5f, 0.5f, 0.5f];

    private static PictureSize Size(JsonElement e) => new(e[0].GetInt32(), e[1].GetInt32());

    private static IEnumerable<TestCaseData> Resizes() =>
        from e in ImageReference.Load("resize.json")
        select new TestCaseData(e)
            .SetName($"Resizes {e.GetProperty("size")} to {e.GetProperty("to")}");

    private static IEnumerable<TestCaseData> Pieces() =>
        from e in ImageReference.Load("pixels.json")
        let size = e.GetProperty("size")
        select new TestCaseData(e).SetName($"Cuts {size} into {e.GetProperty("max_slice_nums")}");

    [TestCaseSource(nameof(Resizes))]
    public void ResizesAsPillow(JsonElement e)
    {
        var (size, to) = (Size(e.GetProperty("size")), Size(e.GetProperty("to")));
        using var picture = e.TryGetProperty("formula", out var k)
            ? ImageReference.Formula(size.Width, size.Height, k.GetInt32())
            : Stored(e.GetProperty("input").GetString()!, size);
        string expected = e.GetProperty("sha256").GetString()!;
        foreach (bool plain in (bool[])[false, true])
        {
            if (plain && (long)size.Width * size.Height > 1_000_000) continue;
            using var result = new Picture(to.Width, to.Height);
            new Bicubic { Plain = plain }.Resize(picture, result);
            Assert.That(ImageReference.Hash(result.Rgb), Is.EqualTo(expected),
                $"plain kernels: {plain}");
        }
    }

    private static Picture Stored(string name, PictureSize size)
    {
        var picture = new Picture(size.Width, size.Height);
        double[] values = ReferenceFile.Open("images/resize").Doubles(name);
        for (int i = 0; i < values.Length; i++) picture.Rgb[i] = (byte)values[i];
        return picture;
    }

    /// <summary>Vector and plain kernels, one object for all shapes, so that reuse is tried
    /// too.</summary>
    [Test]
    public void VectorAndPlainKernelsAgree()
    {
        var random = new Random(7);
        var (vector, plain) = (new Bicubic(), new Bicubic { Plain = true });
        for (int i = 0; i < 150; i++)
        {
            int most = i % 10 == 0 ? 900 : 60;
            using var picture = new Picture(random.Next(1, most), random.Next(1, most));
            random.NextBytes(picture.Rgb);
            if (i % 3 == 0)
                foreach (ref byte b in picture.Rgb) b = b < 128 ? (byte)0 : (byte)255;
            using var a = new Picture(random.Next(1, 90), random.Next(1, 90));
            using var b2 = new Picture(a.Width, a.Height);
            vector.Resize(picture, a);
            plain.Resize(picture, b2);
            Assert.That(a.Rgb.SequenceEqual(b2.Rgb), $"{picture.Size} to {a.Size}");
        }
    }

    [Test]
    public void SlicesAsTheOfficialProcessor()
    {
        int lines = 0;
        foreach (string line in ImageReference.SliceLines())
        {
            using var json = JsonDocument.Parse(line);
            var e = json.RootElement;
            var (scale, patch) = e.GetArrayLength() > 6
                ? (e[6].GetInt32(), e[7].GetInt32()) : (448, 14);
            var plan = Slicer.Plan(
                new(e[0].GetInt32(), e[1].GetInt32()), e[2].GetInt32(), scale, patch);
            var expected = e[4].ValueKind == JsonValueKind.Null
                ? new SlicePlan(Size(e[3]), 0, 0, default)
                : new SlicePlan(Size(e[3]), e[4][0].GetInt32(), e[4][1].GetInt32(), Size(e[5]));
            Assert.That(plan, Is.EqualTo(expected), line);
            lines++;
        }

        Assert.That(lines, Is.EqualTo(2508));
    }

    [TestCaseSource(nameof(Pieces))]
    public void PatchesAsTheOfficialProcessor(JsonElement e)
    {
        var size = Size(e.GetProperty("size"));
        using var picture =
            ImageReference.Formula(size.Width, size.Height, e.GetProperty("formula").GetInt32());
        var plan = Slicer.Plan(size, e.GetProperty("max_slice_nums").GetInt32());
        var pieces = e.GetProperty("pieces").EnumerateArray().ToArray();
        Assert.That(plan.Views, Is.EqualTo(pieces.Length));

        var strips = new PatchStrips(s_half, s_half);
        float[] patches = new float[strips.Patches(plan) * strips.PatchLength];
        strips.Write(picture, plan, patches);
        int at = 0;
        var views = Views(picture, plan).ToArray();
        for (int v = 0; v < pieces.Length; v++)
        {
            var grid = strips.Grid(plan, v);
            Assert.That(views[v].Size, Is.EqualTo(Size(pieces[v].GetProperty("size"))));
            Assert.That(ImageReference.Hash(views[v].Rgb),
                Is.EqualTo(pieces[v].GetProperty("rgb_sha256").GetString()), $"pixels of view {v}");
            Assert.That(new[] { grid.Rows, grid.Columns },
                Is.EqualTo(pieces[v].GetProperty("tgt_size").EnumerateArray()
                    .Select(n => n.GetInt32())));
            var rows = patches.AsSpan(at, grid.Patches * strips.PatchLength);
            Assert.That(HashOfStrip(rows, grid.Patches),
                Is.EqualTo(pieces[v].GetProperty("strip_sha256").GetString()),
                $"patches of view {v}");
            at += rows.Length;
            views[v].Dispose();
        }

        Assert.That(at, Is.EqualTo(patches.Length));
    }

    [TestCase(0.5f, 0.5f, true)]
    [TestCase(0.48145466f, 0.26862954f, null)]
    [TestCase(0f, 1f, null)]
    [TestCase(0.1f, 3f, null)]
    public void NormalisesInFloatSteps(float mean, float std, bool? vectorised)
    {
        var normaliser = new PixelNormaliser([mean, 0.5f, mean], [std, 0.5f, 2 * std], 14);
        if (vectorised == true && System.Runtime.Intrinsics.X86.Fma.IsSupported)
            Assert.That(normaliser.Vectorised, "the common values run vectorised");
        byte[] row = new byte[(42 * 7) + 64];
        for (int i = 0; i < row.Length; i++) row[i] = (byte)(i * 89);
        float[] patches = new float[7 * 588];
        normaliser.Write(row.AsSpan(0, 42 * 7), patches);
        for (int i = 0; i < 42 * 7; i++)
        {
            var (pixel, c) = Math.DivRem(i, 3);
            float unit = row[i] / 255f, centred = unit - (c == 1 ? 0.5f : mean);
            float expected = centred / (c switch { 0 => std, 1 => 0.5f, _ => 2 * std });
            float got = patches[(pixel / 14 * 588) + (c * 196) + (pixel % 14)];
            Assert.That(BitConverter.SingleToInt32Bits(got),
                Is.EqualTo(BitConverter.SingleToInt32Bits(expected)));
        }
    }

    /// <summary>Overview and tiles as pictures, by resizing whole and cutting.</summary>
    internal static IEnumerable<Picture> Views(Picture picture, SlicePlan plan)
    {
        yield return Bicubic.Resize(picture, plan.Overview);
        if (!plan.Sliced) yield break;
        var tile = plan.Tile;
        using var refined = Bicubic.Resize(
            picture, new(tile.Width * plan.Columns, tile.Height * plan.Rows));
        for (int i = 0; i < plan.Columns * plan.Rows; i++)
        {
            var (row, column) = Math.DivRem(i, plan.Columns);
            var view = new Picture(tile.Width, tile.Height);
            for (int y = 0; y < tile.Height; y++)
                refined.Row((row * tile.Height) + y).Slice(column * view.Stride, view.Stride)
                    .CopyTo(view.Row(y));
            yield return view;
        }
    }

    // The official strip is [3, 14, 14 * patches]: P[c, y, 14 n + x] = patches[n, c, y, x].
    private static string HashOfStrip(ReadOnlySpan<float> patches, int count)
    {
        float[] strip = new float[patches.Length];
        for (int n = 0; n < count; n++)
            for (int cy = 0; cy < 42; cy++)
                patches.Slice((n * 588) + (cy * 14), 14)
                    .CopyTo(strip.AsSpan((((cy * count) + n) * 14)));
        return ImageReference.Hash(MemoryMarshal.AsBytes<float>(strip));
    }
}
