using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

/// <summary>
/// The audio encoder against the official code (get_audio_embedding of MiniCPM-o 4.5, F32): three
/// clips of different lengths in one batch, whose padding counts.
/// </summary>
[TestFixture]
public sealed class AudioEncoderTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase(DeviceChoice.Cpu)]
    [TestCase(DeviceChoice.Cuda)]
    public void FeaturesAndGradientsAreThoseOfTheOfficialCode(DeviceChoice device)
    {
        ReferenceFile wanted = AudioModel.Wanted;
        using CudaSource? gpu = device == DeviceChoice.Cuda ? new() : null;
        using var model = Open(null, device, gpu);
        Batch batch = AudioModel.Clips(out int[] tokens);
        var probe = new Probe(model.Device);
        model.Model.Load(batch, new BatchUpload(model.Device));
        Graph graph = model.Graph;
        graph.ClearGradients();
        Tensor features = model.Model.Embedded(graph, probe);

        // [clips * frames, width] against [clips, width, frames].
        int[] shape = wanted.Shape("chunk1.conv2");
        double[] conv = wanted.Doubles("chunk1.conv2");
        var across = new double[conv.Length];
        for (int i = 0; i < conv.Length; i++)
            across[(((i / shape[2] / shape[1] * shape[2]) + (i % shape[2])) * shape[1])
                + (i / shape[2] % shape[1])] = conv[i];
        Assert.That(V26.LargestError(probe.Found["audio.conv2"], across), Is.LessThan(1e-5));
        AssertFeatures("chunk1.features", probe.Found["inputs_embeds"], tokens);

        // The loss is the sum of features times d_features.
        double[] slopes = Joined("d_features", tokens.Length);
        Tensor d = model.Device.Allocate(
            new Spec(DType.F32, new Shape(1, slopes.Length)), "slopes");
        model.Device.WriteFloats(d, [.. slopes.Select(v => (float)v)]);
        graph.Backward(graph.Run(new Linear(), features.Reshape(1, slopes.Length), d), 1);
        graph.ZeroUnreachedGradients();
        string[] names = [.. wanted.Names.Where(name => name.StartsWith("grad."))
            .Select(name => name["grad.".Length..])];
        // The resampler learns always.
        Assert.That(names, Is.EquivalentTo(model.ParameterRanges.List.Select(t => t.Name)
            .Where(name => !name.StartsWith("resampler."))));
        foreach (string name in names)
        {
            // Of large tensors every 31st element, and the norm of all.
            float[] got = V26.Gradient(model, name);
            double[] expected = wanted.Doubles("grad." + name);
            float[] some = got.Length == expected.Length ? got
                : [.. got.Where((_, i) => i % 31 == 0)];
            Assert.That(V26.NormError(some, expected), Is.LessThan(1e-4), name);
            double norm = wanted.Doubles("norm." + name)[0];
            Assert.That(Math.Sqrt(got.Sum(v => (double)v * v)),
                Is.EqualTo(norm).Within(1e-4 * norm), name);
        }

        graph.EndStep();
    }

    [Test]
    public void WithoutChunksAFrameSeesAll()
    {
        using var model = Open(config => config["audio_chunk_length"] = -1.0);
        Batch batch = AudioModel.Clips(out int[] tokens);
        var probe = new Probe(model.Device);
        model.Graph.Recording = false;
        model.Model.Load(batch, new BatchUpload(model.Device));
        model.Model.Embedded(model.Graph, probe);
        AssertFeatures("full.features", probe.Found["inputs_embeds"], tokens);
    }

    // Two batches lie on the device together; layers that run again read their own.
    [Test]
    public void LayersThatRunAgainInBackwardGiveTheSameGradients()
    {
        var gradients = new List<float[]>();
        foreach (bool again in (bool[])[false, true])
        {
            using var model = Open(null, arguments: a => a with { GradientCheckpointing = again });
            Batch batch = AudioModel.Clips(out _);
            batch.LabelRows.Add(5);
            batch.Targets.Add(7);
            V26.Gradients(model, ReferenceModel.Of("o45").Full, batch, batch);
            gradients.Add(V26.AllGradients(model));
        }

        Assert.That(gradients[0].Any(v => v != 0));
        Assert.That(gradients[1], Is.EqualTo(gradients[0]));
    }

    [Test]
    public void TheReleasedEncoderHasItsNumberOfParameters()
    {
        // Whisper medium's encoder, and a projection to 4,096 columns.
        const long Convolutions = (1024 * 80 * 3) + 1024 + (1024 * 1024 * 3) + 1024;
        const long Layer = (4 * 1024 * 1024) + (3 * 1024) + (2 * 1024 * 4096) + 4096 + 1024
            + (4 * 1024);
        const long Projection = (1024 * 4096) + 4096 + (4096 * 4096) + 4096;
        ModelSpec spec = AudioModel.Describe(_folder, config =>
        {
            foreach (var (key, value) in new (string, int)[]
            {
                ("hidden_size", 4096), ("num_attention_heads", 32), ("head_dim", 128),
            }) config[key] = value;
            var audio = config["audio_config"]!;
            (audio["d_model"], audio["encoder_layers"]) = (1024, 24);
            (audio["encoder_attention_heads"], audio["encoder_ffn_dim"]) = (16, 4096);
            audio["max_source_positions"] = 1500;
        });
        var audio = spec.Parameters.All.Where(p =>
            spec.Parameters.PartOf(p.Name) == Engine.Weights.ModelPart.Audio).ToArray();
        Assert.That(audio.Sum(p => p.Shape.Count), Is.EqualTo(
            Convolutions + (1500 * 1024) + (24 * Layer) + (2 * 1024) + Projection));
        Assert.That(audio.Where(p => spec.Parameters.Find(p.Name)!.Fixed).Select(p => p.Name),
            Is.EqualTo(new[] { "apm.embed_positions.weight" }));
        Assert.That(spec.Parameters.IsUntouched("tts.head"), Is.True);
    }

    [TestCase("d_model", 62, "a multiple of encoder_attention_heads (4)")]
    [TestCase("encoder_ffn_dim", 128, "4 times d_model (64)")]
    [TestCase("max_source_positions", 161, "a multiple of audio_pool_step (5)")]
    [TestCase("activation_function", "relu", "\"gelu\"")]
    public void OtherEncodersAreRefused(string key, object value, string expected) => Assert.That(
        () => AudioModel.Describe(_folder, config => config["audio_config"]![key] =
            value is int number ? number : (string)value),
        Refuses(expected).And.Message.Contains(key));

    [Test]
    public void ModelsThatDoNotHearAreRefused()
    {
        Assert.That(() => V26.Spec.Hearing(true),
            Refuses("init_audio: MiniCPM-V-2_6 has no audio encoder"));
        Assert.That(() => AudioModel.Describe(_folder, config => config["init_audio"] = false),
            Refuses("key \"init_audio\" is false: the model was saved without its audio encoder"));
        Assert.That(V26.Spec.Hearing(false), Is.SameAs(V26.Spec));
    }

    private TunedModel Open(Action<System.Text.Json.Nodes.JsonObject>? change,
        DeviceChoice device = DeviceChoice.Cpu, CudaSource? gpu = null,
        Func<TrainArguments, TrainArguments>? arguments = null)
    {
        TrainArguments all = ReferenceModel.Of("o45").Full with
        {
            ModelNameOrPath = AudioModel.Write(
                Directory.CreateDirectory(Path.Combine(_folder, Path.GetRandomFileName())).FullName,
                change),
            InitAudio = true,
            TuneAudio = true,
            TuneVision = false,
            TuneLlm = false,
            Device = device,
        };
        return TunedModel.Open(arguments?.Invoke(all) ?? all, gpu?.Source ?? DeviceSource.Default);
    }

    private static void AssertFeatures(string name, float[] got, int[] tokens)
    {
        double[] expected = Joined(name, tokens.Length);
        Assert.That(got, Has.Length.EqualTo(expected.Length));
        double error = V26.LargestError(got, expected);
        TestContext.Out.WriteLine($"{name}: {error:E2} of the largest");
        Assert.That(error, Is.LessThan(1e-5));
    }

    private static double[] Joined(string name, int count) => [.. Enumerable.Range(0, count)
        .SelectMany(i => AudioModel.Wanted.Doubles($"{name}.{i}"))];

    private sealed class Probe(Device device) : ITensorProbe
    {
        public Dictionary<string, float[]> Found { get; } = [];

        public void Visit(string name, Tensor tensor) => Found[name] = device.ReadFloats(tensor);
    }
}
