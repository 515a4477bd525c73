using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Places of tokens on the canvases of pictures (V-4_7), and how they turn queries and keys, as
/// transformers has them.
/// </summary>
[TestFixture]
public sealed class CanvasPlacesTests
{
    private static readonly JsonElement s_file = ReferenceText.Json("v47/position_ids.json");

    [Test]
    public void EveryLayoutHasItsPlaces()
    {
        CanvasTokens tokens = Tokens();
        int layouts = 0;
        foreach (JsonElement row in s_file.GetProperty("rows").EnumerateArray())
        {
            string name = row.GetProperty("name").GetString()!;
            int[] ids = [.. row.GetProperty("tokens").EnumerateArray()
                .SelectMany(run => Enumerable.Repeat(run[0].GetInt32(), run[1].GetInt32()))];
            CanvasPlace[] places = tokens.Places(ids, Grids(row, ids, tokens));
            Assert.That(places.Select(p => p.Text), Is.EqualTo(Row("T")), name);
            Assert.That(places.Select(p => p.Row), Is.EqualTo(Row("H")), name);
            Assert.That(places.Select(p => p.Column), Is.EqualTo(Row("W")), name);
            Assert.That(places.Max(p => p.Largest) + 1 - ids.Length,
                Is.EqualTo(row.GetProperty("delta").GetInt32()), name);
            layouts++;

            int[] Row(string axis) => ReferenceText.Ints(row.GetProperty(axis));
        }

        Assert.That(layouts, Is.EqualTo(254));
    }

    [TestCase("released", 256, 1e7, new[] { 11, 11, 10 })]
    [TestCase("small", 32, 1e4, new[] { 2, 1, 1 })]
    [TestCase("default_section", 64, 1e6, new[] { 11, 11, 10 })]
    public void EachFrequencyTurnsByItsPlace(
        string name, int headDim, double theta, int[] sections)
    {
        var reference = ReferenceFile.OpenCommitted("v47/mrope");
        double[] positions = reference.Doubles(name + ".positions");
        double[] cos = reference.Doubles(name + ".cos"), sin = reference.Doubles(name + ".sin");
        double[] rows = reference.Doubles(name + ".row_of_frequency");
        int half = rows.Length, tokens = positions.Length / 3;
        var spec = new DecoderSpec(
            8, headDim, 8, 1, 1, 1, headDim, 1e-6f, false, false, theta, RopeScaling.None, 4096)
        {
            RotatedColumns = 2 * half,
            RopeSections = [.. sections],
        };
        var batch = new Batch();
        batch.Clear();
        batch.AddRow(new int[tokens], [], places: [.. Enumerable.Range(0, tokens).Select(t =>
            new CanvasPlace((int)positions[t], (int)positions[tokens + t],
                (int)positions[(2 * tokens) + t]))]);
        using var device = new CpuDevice(1);
        var tables = new Tables(new CanvasRope(spec));
        new BatchUpload(device).Run(batch, [tables]);
        int[] read = new int[tokens];
        device.Read<int>(tables.Made.Rows, read);
        float[] ours = device.ReadFloats(tables.Made.Cos),
            sines = device.ReadFloats(tables.Made.Sin);
        var seen = new HashSet<double>();
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < half; k++)
            {
                // Theirs has each frequency twice.
                int at = (read[t] * half) + k, theirs = (t * 2 * half) + k;
                Assert.That(ours[at], Is.EqualTo(cos[theirs]).Within(1e-6));
                Assert.That(sines[at], Is.EqualTo(sin[theirs]).Within(1e-6));
                seen.Add(rows[k]);
            }

        Assert.That(seen, Has.Count.EqualTo(3));
    }

    [Test]
    public void ViewsThatAreNotThePlacesAreAMistake()
    {
        int[] ids = [1, 611, 607, 607, 612];
        Assert.That(() => Tokens().Places(ids, [new PatchGrid(1, 1)]),
            Throws.ArgumentException.With.Message.Contains("view 0 has 1"));
        Assert.That(() => Tokens().Places(ids, []),
            Throws.ArgumentException.With.Message.Contains("there are 0 views"));
    }

    [TestCase("newline_id", null, "has no newline_id")]
    [TestCase("slice_start_id", null, "has no slice_start_id")]
    [TestCase("image_end_id", 5, "expected ")]
    public void WithoutTheTokensOfPicturesAModelIsRefused(string key, int? id, string message)
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        try
        {
            V46.Changed(folder, (config, _) => AsV47(config));
            ModelSpec spec = ModelSpec.Read(folder);
            Assert.That(spec.Family.Name, Is.EqualTo("MiniCPM-V-4_7"));
            Assert.That(spec.Rows().Canvas, Is.Not.Null);
            V46.Changed(folder, (config, _) =>
            {
                AsV47(config);
                config[key] = id;
            });
            Assert.That(() => ModelSpec.Read(folder).Rows(), Throws.TypeOf<InputException>()
                .With.Message.Contains(message).And.Message.Contains("the tokenizer's"));
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    /// <summary>Makes the configuration of V-4_6's reference model one of V-4_7.</summary>
    public static void AsV47(JsonObject config)
    {
        var tokenizer = Engine.Data.Text.Tokenizer.Load(V46.Model);
        config["model_type"] = "minicpmv4_7";
        foreach (var (key, token) in (IEnumerable<(string, string)>)[
            ("image_start_id", "<image>"), ("image_end_id", "</image>"),
            ("slice_start_id", "<slice>"), ("slice_end_id", "</slice>"), ("newline_id", "\n")])
            config[key] = tokenizer.Encode(token)[0];
    }

    /// <summary>V-4_6's reference model as one of V-4_7, with its weights.</summary>
    public static string ModelAsV47(string folder)
    {
        V46.Changed(folder, (config, _) => AsV47(config));
        File.Copy(Path.Combine(V46.Model, Checkpoint.SingleFile),
            Path.Combine(folder, Checkpoint.SingleFile), overwrite: true);
        return folder;
    }

    private static CanvasTokens Tokens()
    {
        JsonElement ids = s_file.GetProperty("ids");
        return new CanvasTokens(
            (Id("image_token_id"), Id("video_token_id")), Id("image_start_id"),
            Id("image_end_id"), Id("slice_start_id"), Id("slice_end_id"), Id("newline_id"));

        int Id(string key) => ids.GetProperty(key).GetInt32();
    }

    // Pictures and videos have lists of their own; a slice reads its picture's.
    private static List<PatchGrid> Grids(JsonElement row, int[] ids, CanvasTokens tokens)
    {
        int divisor = row.GetProperty("downsample_mode").GetString() == "16x" ? 4 : 2;
        PatchGrid[] images = Read("image_sizes"), videos = Read("video_sizes");
        var grids = new List<PatchGrid>();
        int image = 0, video = 0;
        for (int t = 0; t < ids.Length; t++)
        {
            if (t > 0 && ids[t] == ids[t - 1]) continue;
            if (ids[t] == tokens.Features.Picture) grids.Add(images[image++]);
            if (ids[t] == tokens.Features.Video) grids.Add(videos[video++]);
        }

        return grids;

        PatchGrid[] Read(string key) => [.. row.GetProperty(key).EnumerateArray().Select(size =>
            new PatchGrid(size[0].GetInt32() / divisor, size[1].GetInt32() / divisor))];
    }

    private sealed class Tables(CanvasRope rope) : IBatchInput
    {
        public (Tensor Rows, Tensor Cos, Tensor Sin) Made { get; private set; }

        public long Count(Batch batch) => batch.Tokens.Count + rope.Count(batch);

        public void Load(Batch batch, BatchUpload upload) => Made = rope.Load(batch, upload);
    }
}
