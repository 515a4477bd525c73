using System.Security.Cryptography;
using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>What is MiniCPM-OCR's own: its pictures, configuration, places of features.</summary>
[TestFixture]
public sealed class MiniCpmOcrTests
{
    private static readonly NativeCase s_case = NativeCase.Of("ocr");
    private static readonly ModelSpec s_spec = ModelSpec.Read(s_case.Model);
    private string _folder = "";

    private static IEnumerable<TestCaseData> Pictures => ReferenceText.Json("ocr/images.json")
        .EnumerateArray().Select(p => new TestCaseData(p)
            .SetArgDisplayNames(p.GetProperty("name").GetString()!));

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // Pixels, what decides about small pictures, sizes, and every byte of every view.
    [TestCaseSource(nameof(Pictures))]
    public void APictureBecomesTheProcessorsViews(JsonElement expected)
    {
        using Picture picture = Open(expected);
        Assert.That(Hash(picture.Rgb), Is.EqualTo(expected.GetProperty("rgb_sha256").GetString()));
        AssertFigures(GlyphFigures.Of(picture), 448, expected.GetProperty("classifier"));
        foreach (JsonElement run in expected.GetProperty("runs").EnumerateArray())
        {
            JsonElement options = run.GetProperty("options");
            bool slices = !options.TryGetProperty("slice_mode", out var mode) || mode.GetBoolean();
            var slicing = new SlicingSpec(
                slices ? Number("max_slice_nums", 9) : 1, Number("scale_resolution", 448), 14)
            {
                Merges = options.TryGetProperty("downsample_mode", out var down)
                    && down.GetString() == "16x" ? 4 : 2,
                Small = Enum.Parse<SmallPictures>(
                    options.GetProperty("small_image_upsize").GetString()!, ignoreCase: true),
            };
            SlicePlan plan = slicing.Plan(
                picture.Size, () => picture.Cut(0, 0, picture.Size));
            Assert.That((int[])[plan.Rows, plan.Columns],
                Is.EqualTo(ReferenceText.Ints(run.GetProperty("grid"))), run.ToString());
            var strips = new PatchStrips([0, 0, 0], [1, 1, 1], narrow: true);
            float[] patches = new float[strips.Patches(plan) * strips.PatchLength];
            strips.Write(picture, plan, patches);
            int at = 0;
            string[] hashes = [.. run.GetProperty("strips").EnumerateArray()
                .Select(h => h.GetString()!)];
            JsonElement sizes = run.GetProperty("target_sizes");
            Assert.That(plan.Views, Is.EqualTo(hashes.Length));
            for (int view = 0; view < plan.Views; view++)
            {
                PatchGrid grid = strips.Grid(plan, view);
                Assert.That((int[])[grid.Rows, grid.Columns],
                    Is.EqualTo(ReferenceText.Ints(sizes[view])), options.ToString());
                int length = grid.Patches * strips.PatchLength;
                Assert.That(Hash(Bytes(patches.AsSpan(at, length), grid)),
                    Is.EqualTo(hashes[view]), $"view {view} of {options}");
                at += length;
            }

            int Number(string key, int otherwise) =>
                options.TryGetProperty(key, out var value) ? value.GetInt32() : otherwise;
        }
    }

    [Test]
    public void SizesAreTheProcessors()
    {
        foreach (JsonElement row in s_case.Json("sizes.json").EnumerateArray())
        {
            var size = new PictureSize(row[0].GetInt32(), row[1].GetInt32());
            foreach (var (small, column) in (IEnumerable<(SmallPictures, int)>)[
                (SmallPictures.Always, 6), (SmallPictures.Never, 7)])
            {
                SlicePlan plan = new SlicingSpec(row[4].GetInt32(), row[3].GetInt32(), 14)
                {
                    Merges = row[2].GetString() == "16x" ? 4 : 2,
                    Small = small,
                }.Plan(size, () => throw new AssertionException("no pixels are needed"));
                Assert.That((int[])[plan.Overview.Height, plan.Overview.Width],
                    Is.EqualTo(ReferenceText.Ints(row[column])), row.ToString());
                Assert.That(plan.Sliced, Is.EqualTo(row[5].ValueKind != JsonValueKind.Null));
                if (plan.Sliced)
                    Assert.That((int[])[plan.Rows, plan.Columns, plan.Tile.Height, plan.Tile.Width],
                        Is.EqualTo(ReferenceText.Ints(row[5]).Concat(ReferenceText.Ints(row[8]))),
                        row.ToString());
            }
        }
    }

    [Test]
    public void SingleRulesAreTheLibraries()
    {
        JsonElement rules = s_case.Json("rules.json");
        foreach (JsonElement case_ in rules.GetProperty("otsu").EnumerateArray())
        {
            var histogram = new int[256];
            foreach (JsonElement level in case_.GetProperty("histogram").EnumerateArray())
                histogram[level[0].GetInt32()] = level[1].GetInt32();
            Assert.That(GlyphFigures.Otsu(histogram),
                Is.EqualTo(case_.GetProperty("threshold").GetInt32()), case_.ToString());
        }

        foreach (JsonElement case_ in rules.GetProperty("components").EnumerateArray())
        {
            string[] rows = [.. case_.GetProperty("rows").EnumerateArray()
                .Select(r => r.GetString()!)];
            byte[] mask = [.. rows.SelectMany(r => r.Select(c => (byte)(c == '#' ? 1 : 0)))];
            Assert.That(GlyphFigures.Parts(mask, rows[0].Length).Order(),
                Is.EqualTo(case_.GetProperty("components").EnumerateArray()
                    .Select(c => (c[0].GetInt32(), c[1].GetInt32(), c[2].GetInt32()))));
        }

        foreach (JsonElement row in rules.GetProperty("grey").EnumerateArray())
            Assert.That(GlyphFigures.Grey(row[0].GetInt32(), row[1].GetInt32(), row[2].GetInt32()),
                Is.EqualTo(row[3].GetInt32()), row.ToString());
        foreach (JsonElement row in rules.GetProperty("over_white").EnumerateArray())
            Assert.That(White.Under(row[0].GetInt32(), row[1].GetInt32()),
                Is.EqualTo(row[2].GetInt32()), row.ToString());
        foreach (JsonElement axis in rules.GetProperty("axis_weights").EnumerateArray())
        {
            var weights = new BicubicWeights();
            weights.Compute(axis.GetProperty("n_in").GetInt32(),
                axis.GetProperty("n_out").GetInt32(), narrow: true);
            Assert.That(weights.Precision, Is.EqualTo(axis.GetProperty("precision").GetInt32()));
            foreach (var (i, taps) in axis.GetProperty("weights").EnumerateArray().Index())
            {
                int skipped = axis.GetProperty("first_tap")[i].GetInt32() - weights.First[i];
                foreach (var (t, tap) in taps.EnumerateArray().Index())
                    Assert.That(weights.Tap(i, t + skipped), Is.EqualTo(tap.GetInt32()));
            }
        }
    }

    [TestCase(false)]
    [TestCase(true)]
    public void ResizingIsTorchvisionsToTheByte(bool plain)
    {
        var file = ReferenceFile.OpenAt(s_case.At("resize"));
        string[] names = [.. file.Names.Where(n => n.EndsWith(".in", StringComparison.Ordinal))];
        Assert.That(names, Has.Length.EqualTo(14));
        foreach (string name in names)
        {
            using Picture from = NativeCase.Pixels(file, name);
            using Picture wanted = NativeCase.Pixels(file, name[..^2] + "out");
            using var got = new Picture(wanted.Width, wanted.Height);
            new Bicubic { Narrow = true, Plain = plain }.Resize(from, got);
            Assert.That(got.Rgb.SequenceEqual(wanted.Rgb), Is.True, name);
        }
    }

    [Test]
    public void EveryParameterIsKnownByNameAndShape()
    {
        Assert.That(s_spec.Parameters.All.Select(p => $"{p.Name} {p.Shape}"),
            Is.EquivalentTo(s_case.Json("parameters.json").EnumerateObject().Select(p =>
                $"{p.Name} [{string.Join(", ", ReferenceText.Ints(p.Value))}]")));
        // What no gradient reaches is neither trained nor decayed.
        Assert.That(s_spec.Parameters.All.Where(p => p.Fixed).Select(p => p.Name),
            Is.EquivalentTo(s_spec.Parameters.All.Select(p => p.Name)
                .Where(n => n.Contains(".vit_merger."))));
        Assert.That(s_spec.Parameters.All.Where(p => !p.Decays && !p.Fixed).Select(p => p.Name),
            Is.EquivalentTo(s_case.Json("full_steps.json").GetProperty("without_weight_decay")
                .EnumerateArray().Select(n => n.GetString()!)
                .Where(n => !n.Contains(".vit_merger."))));
    }

    [Test]
    public void PlacesOfPicturesAreTheProcessors()
    {
        foreach (JsonElement call in s_case.Json("chat.json").GetProperty("processor")
            .EnumerateArray())
        {
            ModelSpec spec = s_case.Changed(_folder, (config, processor) =>
            {
                foreach (JsonProperty option in call.GetProperty("options").EnumerateObject())
                    processor[option.Name] = System.Text.Json.Nodes.JsonNode.Parse(
                        option.Value.GetRawText());
                config["downsample_mode"] = processor["downsample_mode"]!.DeepClone();
            });
            RowFormat format = spec.Rows();
            SlicingSpec slicing = format.SlicingUpTo(format.Slicing.MaxSliceNums);
            SlicePlan[] plans = [.. ReferenceText.Ints(call.GetProperty("pictures")).Select(i =>
            {
                using Picture picture = s_case.Picture(i);
                return slicing.Plan(picture.Size, () => s_case.Picture(i));
            })];
            int picture = 0;
            foreach (var (text, given) in call.GetProperty("texts").EnumerateArray().Index())
            {
                string[] parts = given.GetString()!.Split("<|image_pad|>");
                string filled = parts[0];
                for (int k = 1; k < parts.Length; k++)
                    filled += format.Placeholders.Text(
                        plans[picture++], format.Numbered ? k - 1 : null) + parts[k];
                int padding = ReferenceText.Ints(call.GetProperty("attention_mask")[text])
                    .Count(m => m == 0);
                int[] ids = ReferenceText.Ints(call.GetProperty("input_ids")[text]);
                Assert.That(format.Tokenizer.Encode(filled),
                    Is.EqualTo(padding == 0 ? ids : ids[padding..]));
            }
        }
    }

    [Test]
    public void ClassDefaultsAreFourTimesTheTokensAndATiedHead()
    {
        ModelSpec spec = s_case.Changed(_folder, (config, processor) =>
        {
            foreach (string key in (string[])["downsample_mode", "tie_word_embeddings"])
            {
                config.Remove(key);
                processor.Remove(key);
            }

            processor.Remove("small_image_upsize");
        });
        Assert.That(spec.Decoder.TiedHead, Is.True);
        Assert.That(spec.Slicing.Multiple, Is.EqualTo(28));
        Assert.That(spec.Slicing.Small, Is.EqualTo(SmallPictures.Always));
    }

    // As PyTorch leaves alone what has no gradient.
    [TestCase(DecayScope.Hf)]
    [TestCase(DecayScope.All)]
    public void AdaptersOnWhatDoesNotRunStayAsTheyAre(DecayScope scope)
    {
        TrainArguments arguments = s_case.Lora with
        {
            LoraTargetModules = new TargetModules(
                @".*(vit_merger\.linear_\d|layers\.0\.linear_attn\.out_proj)"),
            WeightDecay = 0.1,
            WeightDecayScope = scope,
        };
        using var model = TunedModel.Open(arguments);
        Dictionary<string, float[]> before = Values();
        var trainer = new Trainer(arguments, model);
        Batch batch = s_case.Batch(model.Loaded.Rows, 3);
        for (int i = 0; i < 2; i++) trainer.Step(i, [batch], 1e-2);
        foreach (var (name, values) in Values())
            Assert.That(values.SequenceEqual(before[name]),
                Is.EqualTo(name.Contains("vit_merger")), name);

        Dictionary<string, float[]> Values() => model.ParameterRanges.List.ToDictionary(
            t => t.Name, t => model.Device.ReadFloats(model.ParameterRanges.Value(t.Name)));
    }

    // The same weights with the merger in the vision tower: features, loss, every gradient.
    [Test]
    public void SixteenPatchesAFeatureAreTheClassesToo()
    {
        var wanted = ReferenceFile.OpenAt(s_case.At("case_16x"));
        s_case.Changed(_folder, (config, processor) =>
        {
            config["downsample_mode"] = "16x";
            processor["downsample_mode"] = "16x";
        });
        string weights = Path.Combine(_folder, Checkpoint.SingleFile);
        File.Copy(Path.Combine(s_case.Model, Checkpoint.SingleFile), weights);
        using var model = TunedModel.Open(s_case.Full with { ModelNameOrPath = _folder });
        int[] ids = Ints("input_ids"), labels = Ints("labels");
        var batch = new Batch();
        batch.Clear();
        for (int t = 0; t + 1 < ids.Length; t++)
            if (labels[t + 1] != -100)
            {
                batch.LabelRows.Add(t);
                batch.Targets.Add(labels[t + 1]);
            }

        s_case.Append(batch, model.Loaded.Rows, ids, [0]);
        Assert.That(batch.Grids.Span.ToArray(), Is.EqualTo(Ints("target_sizes")));
        Trace trace = Trace.Run(model, batch, gradients: true);
        foreach (var (ours, theirs) in (IEnumerable<(string, string)>)[
            ("vision.vit_merger", "vision.vit_merger"), ("merger", "image_features"),
            ("vision.post_layernorm", "vision.post_layernorm"), ("loss", "loss")])
            Assert.That(V26.LargestError(trace.Floats[ours].Values, wanted.Doubles(theirs)),
                Is.LessThan(1e-5), ours);
        V26.AssertGradients(model, s_case.Json("grads_16x.json"));

        int[] Ints(string name) => [.. wanted.Doubles(name).Select(v => (int)v)];
    }

    [Test]
    public void AnUnknownRuleForSmallPicturesIsRefused() => Assert.That(
        () => s_case.Changed(_folder, (_, processor) => processor["small_image_upsize"] = "maybe"),
        Throws.TypeOf<InputException>().With.Message.Contains("\"always\", \"never\" or"));

    private static void AssertFigures(GlyphFigures got, int full, JsonElement expected)
    {
        int? resolution = expected.GetProperty("resolution").ValueKind == JsonValueKind.Null
            ? null : expected.GetProperty("resolution").GetInt32();
        Assert.That((got.Threshold, got.Dark, got.Flipped, got.Components, got.Glyphs, got.Median,
            got.Density, got.Resolution(full)), Is.EqualTo((Int("threshold"), Int("dark_pixels"),
            expected.GetProperty("flipped").GetBoolean(), Int("components"), Int("glyphs"),
            expected.GetProperty("median").GetDouble(),
            expected.GetProperty("density").GetDouble(), resolution)));

        int Int(string key) => expected.GetProperty(key).GetInt32();
    }

    private static Picture Open(JsonElement expected)
    {
        if (expected.TryGetProperty("file", out var file))
            return PictureDecoder.Decode(
                ReferenceText.Bytes("ocr/" + file.GetString()), "picture", overWhite: true);
        int[] size = ReferenceText.Ints(expected.GetProperty("size"));
        JsonElement recipe = expected.GetProperty("recipe");
        var picture = new Picture(size[0], size[1]);
        Span<byte> rgb = picture.Rgb;
        for (int i = 0; i < rgb.Length; i++)
        {
            if (recipe.TryGetProperty("seed", out var seed))
            {
                rgb[i] = (byte)SplitMix(seed.GetUInt64() + (ulong)i);
                continue;
            }

            int x = i / 3 % size[0], y = i / 3 / size[0];
            rgb[i] = (byte)((i % 3) switch
            {
                0 => (3 * x) + (2 * y) + ((x * y) >> 6),
                1 => ((x * x) >> 7) + y,
                _ => 255 - ((x ^ y) & 255),
            });
        }

        return picture;
    }

    private static ulong SplitMix(ulong state)
    {
        ulong z = state + 0x9E3779B97F4A7C15;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }

    // Patches, taken as they are divided by 255, as the picture's rows.
    private static byte[] Bytes(ReadOnlySpan<float> patches, PatchGrid grid)
    {
        int width = 14 * grid.Columns;
        var bytes = new byte[3 * width * 14 * grid.Rows];
        for (int i = 0; i < patches.Length; i++)
        {
            int patch = i / (3 * 196), channel = i / 196 % 3, y = i / 14 % 14, x = i % 14;
            int row = (patch / grid.Columns * 14) + y, column = (patch % grid.Columns * 14) + x;
            bytes[(((row * width) + column) * 3) + channel] = (byte)MathF.Round(255 * patches[i]);
        }

        return bytes;
    }

    private static string Hash(ReadOnlySpan<byte> bytes) =>
        Convert.ToHexStringLower(SHA256.HashData(bytes))[..16];
}
