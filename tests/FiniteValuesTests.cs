using System.Runtime.InteropServices;
using System.Text;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>NaN, Inf and numbers too large for the run's type are named when they are
/// read.</summary>
[TestFixture]
public sealed class FiniteValuesTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // BF16's largest is (2 - 2^-7) 2^127, F16's 65504; what lies half a step above rounds away.
    [TestCase("F32", DType.F32, float.MaxValue, float.PositiveInfinity)]
    [TestCase("F32", DType.F32, -float.MaxValue, float.NaN)]
    [TestCase("F32", DType.BF16, 3.3961773e38f, 3.3961775e38f)]
    [TestCase("F32", DType.F16, -65519.996f, -65520f)]
    [TestCase("BF16", DType.BF16, 3.3895314e38f, float.NegativeInfinity)]
    [TestCase("BF16", DType.F16, 65280f, 65536f)]
    [TestCase("BF16", DType.F32, 3.3895314e38f, float.NaN)]
    [TestCase("F16", DType.F16, -65504f, float.PositiveInfinity)]
    [TestCase("F16", DType.F32, 65504f, float.NaN)]
    [TestCase("F64", DType.F32, 3.4028235677973362e38, 3.4028235677973366e38)]
    [TestCase("F64", DType.F16, 65519.99999999999, -65520.0)]
    [TestCase("F64", DType.F32, 0.0, double.NaN)]
    public void TheFirstValueThatIsNoneIsNamed(string type, DType kept, double good, double bad)
    {
        foreach (int count in (int[])[1, 7, 64, 1001])
        {
            var values = new double[count];
            values.AsSpan().Fill(good);
            Check(values);
            foreach (int at in (int[])[0, count / 2, count - 1])
            {
                values.AsSpan().Fill(good);
                values.AsSpan(at).Fill(bad);
                Assert.That(Refused(values), Does.Contain(
                    $"w.safetensors: tensor \"a.weight\", element {at:N0} is "));
            }
        }

        void Check(double[] values)
        {
            using var file = Write(type, values);
            StoredTensor tensor = file.Get("a.weight");
            tensor.MustBeFinite(kept);
            Assert.That(tensor.Data, Is.Not.Zero);
        }

        string Refused(double[] values) =>
            Assert.Throws<InputException>(() => Check(values))!.Message;
    }

    [Test]
    public void LargeTensorsAreLookedAtWholeByAllThreads()
    {
        var values = new double[1_500_001];
        values[1_000_000] = values[^1] = values[^2] = double.NaN;
        using var file = Write("F32", values);
        StoredTensor tensor = file.Get("a.weight");
        tensor.MustBeFinite(DType.F32);
        Assert.That(() => tensor.Data, Throws.TypeOf<InputException>()
            .With.Message.Contains("element 1,000,000 is NaN"));
    }

    [Test]
    public void AFileThatIsCutWhileItIsOpenIsOneClearLine()
    {
        if (!OperatingSystem.IsLinux()) Assert.Ignore("only Linux tells");
        using var file = Write("F32", new double[100_000]);
        StoredTensor tensor = file.Get("a.weight");
        tensor.MustBeFinite(DType.F32);
        Assert.That(Truncate(file.Path, 4096), Is.Zero);
        Assert.That(() => tensor.Data, Throws.TypeOf<InputException>()
            .With.Message.Contains("was changed or cut while it was in use"));
    }

    // Frozen, packed, looked up, fused and trained tensors are read in different ways.
    [TestCase("llm.model.layers.0.mlp.up_proj.weight", true)]
    [TestCase("llm.model.embed_tokens.weight", true)]
    [TestCase("llm.model.norm.weight", true)]
    [TestCase("resampler.attn.in_proj_weight", true)]
    [TestCase("resampler.proj", false)]
    public void AModelWithSuchAValueIsRefused(string name, bool lora)
    {
        string folder = Directory.CreateDirectory(Path.Combine(_folder, "model")).FullName;
        foreach (string from in Directory.GetFiles(V26.Model))
            File.Copy(from, Path.Combine(folder, Path.GetFileName(from)));
        string weights = Path.Combine(folder, Checkpoint.SingleFile);
        if (!File.Exists(weights)) Assert.Ignore("the model is in pieces");
        long at;
        using (var file = SafetensorsFile.Open(weights))
        {
            StoredTensor tensor = file.Get(name);
            Assert.That(tensor.Type, Is.EqualTo(DType.BF16));
            at = tensor.Offset;
        }

        var arguments = (lora ? V26.Lora : V26.Full) with { ModelNameOrPath = folder };
        Put(0x4800);
        using (TunedModel.Open(arguments)) { }
        Assert.That(() => TunedModel.Open(arguments with { Fp16 = true }),
            Throws.TypeOf<InputException>().With.Message.Contains(
                $"model.safetensors: tensor \"{name}\", element 1 is 131072, too large for F16"));
        Put(0x7FC0);
        Assert.That(() => TunedModel.Open(arguments), Throws.TypeOf<InputException>()
            .With.Message.Contains($"tensor \"{name}\", element 1 is NaN"));

        void Put(ushort bits)
        {
            using var stream = File.OpenWrite(weights);
            stream.Position = at + 2;
            stream.Write(BitConverter.GetBytes(bits));
        }
    }

    // .NET's own way respects the lock on the open file, which other programs do not.
    [DllImport("libc", EntryPoint = "truncate")]
    private static extern int Truncate(string path, long bytes);

    private SafetensorsFile Write(string type, double[] values)
    {
        byte[] data = type switch
        {
            "F64" => MemoryMarshal.AsBytes<double>(values).ToArray(),
            "F32" => MemoryMarshal.AsBytes<float>(
                [.. values.Select(v => (float)v)]).ToArray(),
            "F16" => MemoryMarshal.AsBytes<Half>([.. values.Select(v => (Half)v)]).ToArray(),
            _ => MemoryMarshal.AsBytes<ushort>([.. values.Select(v =>
                (ushort)(BitConverter.SingleToUInt32Bits((float)v) >> 16))]).ToArray(),
        };
        byte[] head = Encoding.UTF8.GetBytes(
            $$"""{"a.weight": {"dtype": "{{type}}", "shape": [{{values.Length}}], """
            + $$"""
                "data_offsets": [0, {{data.Length}}] } }
                """);
        string path = Path.Combine(_folder, "w.safetensors");
        File.WriteAllBytes(path, [.. BitConverter.GetBytes((long)head.Length), .. head, .. data]);
        return SafetensorsFile.Open(path);
    }
}
