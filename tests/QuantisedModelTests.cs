using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Quantised;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Adapters on a model of 4 bits, quantised on load or before, against the official code on the
/// dequantised weights in float32 (tests/reference/quant).
/// </summary>
[TestFixture]
public sealed unsafe class QuantisedModelTests
{
    private const string Int4Config = """
        {"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4",
         "bnb_4bit_compute_dtype": "float16", "bnb_4bit_use_double_quant": true}
        """;

    private static readonly TrainArguments s_qlora = V26.Lora with { QLora = true };

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TheDecoderIsQuantisedAsBitsandbytesWouldHaveIt()
    {
        JsonElement expected = Reference("hashes").GetProperty("decoder_nf4");
        using var model = Checkpoint.Open(V26.Model);
        var found = new List<TensorToSave>();
        foreach (string name in expected.EnumerateObject().Select(p => p.Name)
            .Where(n => n.EndsWith(".quant_map", StringComparison.Ordinal)
                && !n.EndsWith("nested_quant_map", StringComparison.Ordinal)))
        {
            StoredTensor stored = model.Get(name[..^".quant_map".Length]);
            found.AddRange(QuantisedModel.Parts(
                stored.Name, stored.Shape, stored.Type, (void*)stored.Data, "bfloat16"));
        }

        AssertHashes(found, expected);
        // And they are what a run takes.
        using var table = TunedModel.Open(s_qlora);
        string[] quantised = [.. expected.EnumerateObject().Select(p => p.Name)
            .Where(n => n.EndsWith("proj.weight", StringComparison.Ordinal))];
        var kind = table.Base.Kind;
        Assert.That(table.Spec.Parameters.All.Select(p => p.Name).Where(kind.Takes),
            Is.EquivalentTo(quantised));
        using var dense = TunedModel.Open(V26.Lora);
        Assert.That(((CpuDevice)table.Device).AllocatedBytes,
            Is.LessThan(((CpuDevice)dense.Device).AllocatedBytes - 1_700_000));
    }

    [Test]
    public void AdaptersOnADecoderQuantisedOnLoad() => AssertCase(s_qlora, "decoder_nf4");

    [Test]
    public void AdaptersOnAQuantisedCheckpoint()
    {
        JsonElement expected = Reference("hashes").GetProperty("int4");
        TensorToSave[] tensors = [.. QuantisedModel.Int4()];
        AssertHashes(tensors, expected);
        QuantisedModel.Write(_folder, tensors, Int4Config);
        AssertCase(V26.Lora with { ModelNameOrPath = _folder }, "int4");
    }

    [Test]
    public void TenStepsAreEqual()
    {
        JsonElement expected = Reference("model").GetProperty("decoder_nf4").GetProperty("train");
        TrainArguments arguments = s_qlora with { WeightDecay = 0.1, AdamBeta2 = 0.95 };
        using var model = TunedModel.Open(arguments);
        var initial = ReferenceFile.OpenCommitted("quant/decoder_nf4_initial");
        foreach (TunedTensor tensor in model.ParameterRanges.List)
            if (tensor.Name.Contains("lora_A", StringComparison.Ordinal))
                model.ParameterRanges.Write(
                    tensor.Name, initial.Floats("base_model.model." + tensor.Name));
        JsonElement[] steps = [.. expected.GetProperty("steps").EnumerateArray()];
        var trainer = new Trainer(arguments, model);
        double worst = 0;
        for (int i = 0; i < steps.Length; i++)
        {
            Batch batch = V26.Batch(s_qlora, steps[i].GetProperty("row").GetString()!);
            StepResult step = trainer.Step(i, [batch], steps[i].GetProperty("lr").GetDouble());
            double loss = steps[i].GetProperty("loss").GetDouble();
            double norm = steps[i].GetProperty("grad_norm").GetDouble();
            worst = Math.Max(worst, Math.Max(
                Math.Abs(step.Loss - loss) / loss, Math.Abs(step.GradientNorm - norm) / norm));
        }

        TestContext.Out.WriteLine($"worst loss or norm {worst:E2}");
        Assert.That(steps, Has.Length.EqualTo(10));
        Assert.That(worst, Is.LessThan(1e-4));
    }

    // Against the same run on the dequantised weights, stored in float32.
    [Test]
    public void MagnitudesAreThoseOfTheQuantisedWeights()
    {
        TrainArguments arguments = s_qlora with
        {
            UseDora = true,
            InitLoraWeights = LoraStart.Parse("false")!,
        };
        using var model = TunedModel.Open(arguments);
        WriteDequantised(model.Base.Kind);
        using var expected = TunedModel.Open(
            arguments with { QLora = false, ModelNameOrPath = _folder });
        Batch batch = V26.Batch(s_qlora, "one");
        double loss = V26.Gradients(expected, arguments, batch).Loss;
        Assert.That(V26.Gradients(model, arguments, batch).Loss,
            Is.EqualTo(loss).Within(1e-5 * loss));
        foreach (TunedTensor tensor in model.ParameterRanges.List)
        {
            Assert.That(model.Device.ReadFloats(model.ParameterRanges.Value(tensor.Name)),
                Is.EqualTo(expected.Device.ReadFloats(
                    expected.ParameterRanges.Value(tensor.Name))), tensor.Name);
            Assert.That(
                V26.NormError(V26.Gradient(model, tensor.Name),
                    Array.ConvertAll(V26.Gradient(expected, tensor.Name), v => (double)v)),
                Is.LessThan(1e-5), tensor.Name);
        }
    }

    // What is asked answers as the model that was trained: that of the dequantised weights.
    [Test]
    public void AskedIn4BitsItIsTheSameModel()
    {
        var arguments = new TrainArguments
        {
            ModelNameOrPath = V26.Model,
            Device = DeviceChoice.Cpu,
            QLora = true,
        };
        using (var trained = TunedModel.Open(s_qlora)) WriteDequantised(trained.Base.Kind);
        using AskedModel asked = AskedModel.Open(arguments, null),
            dense = GenerationCase.Open(_folder), whole = GenerationCase.Open(V26.Model);
        float[] logits = Logits(asked);
        Assert.That(logits, Is.EqualTo(Logits(dense)).Within(1e-5 * logits.Max(Math.Abs)));
        Assert.That(V26.LargestError(logits, Array.ConvertAll(Logits(whole), v => (double)v)),
            Is.GreaterThan(0.01), "4 bits are fewer");
        Assert.That(Held(asked), Is.LessThan(Held(whole) - 1_700_000));

        static long Held(AskedModel model) => ((CpuDevice)model.Model.Device).AllocatedBytes;

        static float[] Logits(AskedModel model) => GenerationCase.Logits(model,
            new GenerationInput(6, batch => batch.AddRow([501, 312, 198, 488, 83, 502], [])));
    }

    [Test]
    public void OnCudaItHasTheGradientsOfTheCpu()
    {
        Batch batch = V26.Batch(s_qlora, "text1");
        using TunedModel expected = Open(s_qlora);
        double loss = V26.Gradients(expected, s_qlora, batch).Loss;
        using var cuda = new CudaUnderTest();
        using BaseModel source = BaseModel.Open(s_qlora);
        using var model = TunedModel.Load(
            source, new OpenDevice(cuda.Device(DType.F32), "GPU"), s_qlora);
        CopyAdapter(model);
        Assert.That(V26.Gradients(model, s_qlora, batch).Loss,
            Is.EqualTo(loss).Within(1e-5 * loss));
        foreach (TunedTensor tensor in model.ParameterRanges.List)
            Assert.That(
                V26.NormError(V26.Gradient(model, tensor.Name),
                    Array.ConvertAll(V26.Gradient(expected, tensor.Name), v => (double)v)),
                Is.LessThan(1e-4), tensor.Name);
    }

    [Test]
    public void TheVisionTowerIsQuantisedIfAsked()
    {
        using var model = BaseModel.Open(
            s_qlora with { LlmInt8SkipModules = ["out_proj", "resampler", "lm_head"] });
        string[] quantised =
            [.. model.Spec.Parameters.All.Select(p => p.Name).Where(model.Kind.Takes)];
        // Those of the decoder, and of the tower q, k, v, fc1 and fc2 of each layer.
        Assert.That(quantised, Has.Length.EqualTo(14 + (5 * model.Spec.Vision.Layers)));
        Assert.That(quantised, Has.None.Contains("out_proj").And.None.Contains("resampler"));
    }

    [Test]
    public void WhatCannotBeTrainedIsRefused()
    {
        QuantisedModel.Write(_folder, QuantisedModel.Int4(), Int4Config);
        Assert.That(() => BaseModel.Open(V26.Full with { ModelNameOrPath = _folder }),
            Throws.TypeOf<InputException>().With.Message.Contains(
                "is quantised, which cannot be trained whole: set use_lora"));
        Assert.That(() => BaseModel.Open(V26.Lora with
        {
            ModelNameOrPath = _folder,
            ModulesToSave = ["vpm"],
        }),
            Throws.TypeOf<InputException>().With.Message.Contains("modules_to_save"));
        Assert.That(
            () => BaseModel.Open(s_qlora with { LlmInt8SkipModules = ["lm_head", "resampled"] }),
            Throws.TypeOf<InputException>().With.Message.EqualTo("llm_int8_skip_modules "
                + "\"resampled\" is no module of the model (did you mean \"resampler\"?)"));
        // Modules that are not quantised can be.
        using var model = BaseModel.Open(V26.Lora with
        {
            ModelNameOrPath = _folder,
            ModulesToSave = ["embed_tokens"],
        });
        Assert.That(model.Parts.Tensors.Select(t => t.Name),
            Has.Some.EqualTo("llm.model.embed_tokens.weight"));
    }

    // The model on the values of its 4-bit codes, stored in float32.
    private void WriteDequantised(QuantisedKind kind)
    {
        using var weights = Checkpoint.Open(V26.Model);
        QuantisedModel.Write(_folder, weights.Tensors.Select(stored =>
        {
            if (!kind.Takes(stored.Name)) return stored.ToSave();
            var form = new FourBitForm(stored.Shape[0], stored.Shape[1], 64, 256);
            FourBitCodes codes = FourBitCodes.Of(
                form, FourBitKind.Nf4, stored.Type, (void*)stored.Data);
            var values = new float[stored.Count];
            codes.Unpack(0, values);
            return new TensorToSave(stored.Name, DType.F32, stored.Shape, stream =>
                stream.Write(System.Runtime.InteropServices.MemoryMarshal.AsBytes<float>(values)));
        }), "null");
    }

    private static void AssertCase(TrainArguments arguments, string name)
    {
        JsonElement expected = Reference("model").GetProperty(name).GetProperty("lora");
        using TunedModel model = Open(arguments);
        Trace trace = Trace.Run(model, V26.Batch(V26.Full, "one", "two-small"), gradients: true);
        double loss = expected.GetProperty("loss").GetDouble();
        Assert.That(trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(1e-5 * loss));
        V26.AssertClose("logits", trace.Floats["logits"], expected.GetProperty("logits"));
        V26.AssertGradients(model, expected.GetProperty("gradients"));
    }

    private static void AssertHashes(IEnumerable<TensorToSave> found, JsonElement expected) =>
        Assert.That(
            found.Select(t => $"{t.Name} {t.Type.Name} [{string.Join(", ", t.Sizes)}] "
                + QuantisedModel.Hash(t)),
            Is.EquivalentTo(expected.EnumerateObject().Select(p => $"{p.Name} {p.Value[0]} "
                + $"[{string.Join(", ", p.Value[1].EnumerateArray())}] {p.Value[2]}")));

    private static JsonElement Reference(string name) =>
        ReferenceText.Json($"quant/{name}.json");

    private static TunedModel Open(TrainArguments arguments)
    {
        var model = TunedModel.Open(arguments);
        CopyAdapter(model);
        return model;
    }

    private static void CopyAdapter(TunedModel model)
    {
        using var adapter = AdapterFile.Open(V26.Adapter("random_lora_only"));
        model.CopyFrom(adapter);
    }
}
