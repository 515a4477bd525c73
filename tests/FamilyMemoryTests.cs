using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What a chat takes of a GPU at the released sizes of every member, with the largest of pictures
/// and sounds, counted on a device that only counts.
/// </summary>
[TestFixture, NonParallelizable]
public sealed class FamilyMemoryTests
{
    // A whole picture and nine slices, each of 448 x 448.
    private const int Views = 10, Side = 32, Patches = Side * Side, Answer = 2048;

    private const string Whisper = """
        , "init_audio": true, "audio_config": {"d_model": 1024, "encoder_attention_heads": 16,
          "encoder_ffn_dim": 4096, "encoder_layers": 24, "activation_function": "gelu"}
        """;

    private string _folder = "";

    [SetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void AChatWithAPictureTakesWeightsAndCacheAndFivePercent(
        [ValueSource(nameof(Models))] string model)
    {
        string[] words = model.Split(' ');
        const string Mode = "\"downsample_mode\": \"4x\"";
        if (words.Contains("4x"))
            File.WriteAllText(
                Path.Combine(_folder, "preprocessor_config.json"), $"{{{Mode}}}");
        ModelSpec spec = ReleasedModels.Read(
            _folder, words[0], words.Contains("4x") ? $", {Mode}" : "");
        int features = spec.Joiner is MergerSpec merger
            ? Patches / (merger.Merges * merger.Merges) : spec.Resampler.Queries;
        Ask(spec, Views * features, batch =>
        {
            for (int i = 0; i < Views; i++)
            {
                batch.Grids.Add([Side, Side]);
                batch.PictureStarts.Add((i + 1) * Patches);
                batch.Patches.Extend(Patches * spec.Vision.PatchLength).Clear();
            }
        }, narrow: words.Contains("NF4"));
    }

    [TestCase("MiniCPM-o-2_6", 1)]
    [TestCase("MiniCPM-o-4_5", 1)]
    [TestCase("MiniCPM-o-4_5", 20)]
    public void AChatWithASoundToo(string model, int clips)
    {
        const int Frames = 3000;
        ModelSpec spec = ReleasedModels.Read(_folder, model, Whisper).Hearing(true);
        int tokens = clips * spec.Audio!.Tokens(Frames);
        Ask(spec, tokens, batch =>
        {
            for (int i = 0; i < clips; i++) batch.AddClip(Frames, spec.Audio.Bands).Clear();
            batch.AddSoundSlots([new ImageBound(0, tokens)], 0);
        }, sound: true);
    }

    private static IEnumerable<string> Models =>
    [
        .. ReleasedModels.All.Keys, "MiniCPM-V-4_6 4x",
        "MiniCPM-V-4 NF4", "MiniCPM-V-4_6 NF4", "MiniCPM-OCR NF4",
    ];

    private static void Ask(ModelSpec spec, int shown, Action<Batch> show, bool sound = false,
        bool narrow = false)
    {
        int tokens = Math.Min(spec.Family.Chat.MaxPromptTokens, 8192);
        using var model = new CountedModel(spec, kind: narrow ? new QuantisedKind(spec.Parameters,
            DType.BF16, new Quantisation(FourBitKind.Nf4, Nested: true), null) : null);
        long weights = model.Held;
        var generator = new Generator(model.Model, model.Counter);
        generator.Reserve(1, tokens + Answer);
        long cached = model.Held - weights;
        int[] ids = [.. Enumerable.Range(0, tokens)];
        ImageBound[] bounds = [new(0, shown)];
        generator.Run([new GenerationInput(tokens, batch => Append(batch, 0, tokens))
        {
            Ids = ids,
            Pictures = bounds,
            AppendPart = Append,
        }], new GenerationSettings { MaxNewTokens = 3 });
        double share = (double)model.Held / (weights + cached);
        TestContext.Out.WriteLine($"{weights:N0} + {cached:N0}, steps "
            + $"{model.Device.Step.Reserved:N0}, held {model.Held:N0}: {share:0.000}");
        Assert.That(share, Is.InRange(1, 1.05));

        void Append(Batch batch, int from, int to)
        {
            CanvasPlace[]? places = spec.Decoder.RopeSections.IsEmpty ? null
                : [.. ids.Take(to).Select(t => new CanvasPlace(t, t, t))];
            batch.AddRow(ids.AsSpan(0, to), sound ? [] : bounds, from, places);
            if (from == 0) show(batch);
        }
    }
}
