using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cases;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Matrices as bitsandbytes, AWQ and GPTQ write them (tests/reference/quant): each is read as the
/// values that their own packages give, and damaged files say what is wrong.
/// </summary>
[TestFixture]
public sealed class QuantisedFileTests
{
    private string _folder = "";

    private static IEnumerable<TestCaseData> Layers =>
        from file in (string[])["bnb_4bit", "bnb_int8", "awq", "gptq"]
        from layer in ReferenceText.Json($"quant/{file}.json").GetProperty(
            "layers").EnumerateObject()
        select new TestCaseData(file, layer.Name);

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCaseSource(nameof(Layers))]
    public void ValuesAreThoseOfThePackage(string file, string layer)
    {
        using Checkpoint checkpoint = Open(file, layer);
        StoredTensor tensor = checkpoint.Get(layer + ".weight");
        var expected = ReferenceFile.OpenCommitted($"quant/{file}_expected");
        float[] wanted = expected.Floats(layer + ".weight");
        Assert.That(tensor, Is.InstanceOf<PackedTensor>());
        Assert.That(tensor.SizesText,
            Is.EqualTo($"[{string.Join(", ", expected.Shape(layer + ".weight"))}]"));
        // Int8 divides by 127, where the order of two roundings is nobody's rule.
        float[] got = tensor.ToFloats();
        if (file == "bnb_int8") Assert.That(got, Is.EqualTo(wanted).Within(1).Ulps);
        else Assert.That(got, Is.EqualTo(wanted));
        Assert.That(got, Has.Some.Not.Zero);
        // What belongs to the layer besides is left, its bias; nothing else.
        Assert.That(checkpoint.Tensors.Where(t => t.Name.StartsWith(
            layer + ".", StringComparison.Ordinal)).Select(t => t.Name[(layer.Length + 1)..]),
            Is.SubsetOf((string[])["weight", "bias"]));
        IsKept((PackedTensor)tensor, got);
    }

    [TestCase("bnb_4bit", "model.layers.0.fp4_plain.weight.absmax", "is missing")]
    [TestCase("bnb_4bit", "model.layers.0.nf4_many_blocks.weight.nested_quant_map", "is missing")]
    [TestCase("bnb_int8", "model.layers.0.mlp.int8_f16.weight", "is missing")]
    [TestCase("awq", "model.layers.0.mlp.g128.qzeros", "is missing")]
    [TestCase("gptq", "model.layers.0.mlp.w4_g128.scales", "is missing")]
    public void AMissingPartIsNamed(string file, string part, string problem)
    {
        using var stored = SafetensorsFile.Open(
            Path.Combine(ReferenceFile.Root, "quant", file + ".safetensors"));
        WriteConfig(file, part[..part.LastIndexOf('.')]);
        CheckpointWriter.Write(
            _folder, [.. stored.Tensors.Where(t => t.Name != part).Select(t => t.ToSave())]);
        Assert.That(() => Checkpoint.Open(_folder), Throws.TypeOf<InputException>()
            .With.Message.Contains(part).And.Message.Contains(problem));
    }

    [TestCase("\"bits\": 3", "bits")]
    [TestCase("\"checkpoint_format\": \"marlin\"", "checkpoint_format")]
    [TestCase("\"quant_method\": \"hqq\"", "quant_method")]
    [TestCase("\"group_size\": -2", "group_size")]
    public void AnotherFormOfGptqIsRefused(string setting, string key)
    {
        string[] all = ["\"bits\": 4", "\"checkpoint_format\": \"gptq\"",
            "\"quant_method\": \"gptq\"", "\"group_size\": 128"];
        File.WriteAllText(Path.Combine(_folder, "config.json"), "{\"quantization_config\": {"
            + string.Join(", ", all.Where(s => !s.Contains(key)).Append(setting)) + "}}");
        File.Copy(Path.Combine(ReferenceFile.Root, "quant", "gptq.safetensors"),
            Path.Combine(_folder, Checkpoint.SingleFile));
        Assert.That(() => Checkpoint.Open(_folder), Throws.TypeOf<InputException>()
            .With.Message.Contains($"quantization_config.{key}"));
    }

    // On a device it multiplies as the values do.
    private static void IsKept(PackedTensor tensor, float[] values)
    {
        using var device = new CpuDevice(1, 1L << 24, DType.F64);
        Weight weight = tensor.On(device, 0, tensor.Outputs)!;
        Value x = Value.Float("x", [3, tensor.Inputs], Fill.Normal(1, 3 * tensor.Inputs));
        using var run = new OpRun(
            device, new Linear(Weight: weight), [x, Value.Absent("w"), Value.Absent("b")]);
        run.Forward();
        double[] y = run.Output;
        for (int r = 0; r < 3; r++)
            for (int n = 0; n < tensor.Outputs; n++)
            {
                double sum = 0;
                for (int k = 0; k < tensor.Inputs; k++)
                    sum += x.Data[(r * tensor.Inputs) + k] * values[(n * tensor.Inputs) + k];
                Assert.That(y[(r * tensor.Outputs) + n], Is.EqualTo(sum).Within(1e-10));
            }

        Assert.That(weight.Bytes, Is.LessThan(tensor.Bytes / 2));
    }

    // AWQ and GPTQ have one configuration for all layers of a file.
    private Checkpoint Open(string file, string layer)
    {
        using var stored = SafetensorsFile.Open(
            Path.Combine(ReferenceFile.Root, "quant", file + ".safetensors"));
        WriteConfig(file, layer);
        CheckpointWriter.Write(_folder, [.. stored.Tensors.Where(t =>
            t.Name.StartsWith(layer + ".", StringComparison.Ordinal)).Select(t => t.ToSave())]);
        return Checkpoint.Open(_folder);
    }

    private void WriteConfig(string file, string layer)
    {
        JsonElement json = ReferenceText.Json($"quant/{file}.json");
        JsonElement all = json.GetProperty("quantization_config");
        string name = layer[(layer.LastIndexOf('.') + 1)..];
        var config = file is not ("awq" or "gptq") ? "{}"
            : (all.TryGetProperty(name, out var own) ? own : all.EnumerateObject().First().Value)
                .GetRawText();
        if (file is "awq" && name == "g32") config = config.Replace("128", "32");
        File.WriteAllText(Path.Combine(_folder, "config.json"),
            $"{{\"quantization_config\": {config}}}");
    }
}
