using System.Buffers.Binary;
using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Damaged headers and configurations: each is read or refused with one line. A crash would take
/// the test run down; what a case may allocate and how long all may take is bounded.
/// </summary>
[TestFixture]
public sealed class HostileModelFileTests
{
    private const int Cases = 10_000;

    private static readonly string s_model = Path.Combine(ReferenceFile.Root, "v26", "model");

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void SafetensorsHeaders()
    {
        byte[] good = File.ReadAllBytes(
            Path.Combine(ReferenceFile.Root, "safetensors", "bnb_linear4bit.safetensors"));
        int length = (int)BinaryPrimitives.ReadInt64LittleEndian(good);
        byte[] header = good[8..(8 + length)], data = good[(8 + length)..];
        string text = Encoding.UTF8.GetString(header),
            path = Path.Combine(_folder, "a.safetensors");
        RunAll(seed: 11, path, most: 2 << 20, (mutations, number) => (number % 4) switch
        {
            0 => mutations.Bytes(good[..Math.Min(good.Length, 8 + length + 64)]),
            1 => SafetensorsTests.Bytes(mutations.Bytes(header), data),
            _ => SafetensorsTests.Bytes(Encoding.UTF8.GetBytes(mutations.Json(text)), data),
        }, ReadAllTensors);
    }

    [Test]
    public void ModelConfigurations()
    {
        foreach (string name in new[] { "preprocessor_config.json", "generation_config.json" })
            File.Copy(Path.Combine(s_model, name), Path.Combine(_folder, name));
        foreach (var (name, cases) in new[]
        {
            ("config.json", Cases), ("preprocessor_config.json", Cases / 10),
            ("generation_config.json", Cases / 10),
        })
        {
            string path = Path.Combine(_folder, name),
                good = File.ReadAllText(Path.Combine(s_model, name));
            if (name != "config.json") File.Copy(Path.Combine(s_model, "config.json"),
                Path.Combine(_folder, "config.json"), overwrite: true);
            RunAll(seed: 12, path, most: 64 << 20, (mutations, number) => number % 2 == 0
                ? mutations.Bytes(Encoding.UTF8.GetBytes(good))
                : Encoding.UTF8.GetBytes(mutations.Json(good)), _ =>
                    ModelSpec.Read(_folder), cases);
            File.WriteAllText(path, good);
        }
    }

    [Test]
    public void AdapterConfigurations()
    {
        var table = ModelSpec.Read(s_model).Parameters;
        string[] goods =
            [.. new[] { "peft021_official", "variant_suffixes", "variant_layer_1" }.Select(name =>
            File.ReadAllText(
                Path.Combine(ReferenceFile.Root, "v26", "adapters", name, "adapter_config.json")))];
        RunAll(seed: 13, Path.Combine(_folder, AdapterConfig.FileName), most: 8 << 20,
            (mutations, number) =>
        {
            string good = goods[number % goods.Length];
            return number % 2 == 0
                ? mutations.Bytes(Encoding.UTF8.GetBytes(good))
                : Encoding.UTF8.GetBytes(mutations.Json(good));
        }, path => AdapterLayout.Create(table, AdapterConfig.Read(path), path));
    }

    [TestCase("bnb_4bit")]
    [TestCase("bnb_int8")]
    [TestCase("awq")]
    [TestCase("gptq")]
    public void QuantisedTensors(string name)
    {
        JsonElement index = ReferenceText.Json($"quant/{name}.json");
        string layer = index.GetProperty("layers").EnumerateObject().First().Name;
        string config = name is "awq" or "gptq" ? index.GetProperty("quantization_config")
            .EnumerateObject().First().Value.GetRawText() : "{}";
        File.WriteAllText(Path.Combine(_folder, "config.json"),
            $$"""{"quantization_config": {{config}}}""");
        // AWQ and GPTQ have one configuration for all layers.
        using (var all = SafetensorsFile.Open(
            Path.Combine(ReferenceFile.Root, "quant", name + ".safetensors")))
            CheckpointWriter.Write(_folder, [.. all.Tensors.Where(t => config == "{}"
                || t.Name.StartsWith(layer + ".", StringComparison.Ordinal)).Select(t =>
                    t.ToSave())]);
        using (var checkpoint = Checkpoint.Open(_folder))
            Assert.That(checkpoint.Tensors.Any(t => t is PackedTensor));
        byte[] good = File.ReadAllBytes(Path.Combine(_folder, Checkpoint.SingleFile));
        int length = (int)BinaryPrimitives.ReadInt64LittleEndian(good);
        byte[] header = good[8..(8 + length)], data = good[(8 + length)..];
        string text = Encoding.UTF8.GetString(header);
        // States are JSON within the data; scales and codes may be anything.
        RunAll(seed: 14, Path.Combine(_folder, Checkpoint.SingleFile), most: 8 << 20,
            (mutations, number) => (number % 3) switch
            {
                0 => [.. good[..(8 + length)], .. mutations.Bytes(data)],
                1 => SafetensorsTests.Bytes(mutations.Bytes(header), data),
                _ => SafetensorsTests.Bytes(Encoding.UTF8.GetBytes(mutations.Json(text)), data),
            }, _ =>
            {
                using var checkpoint = Checkpoint.Open(_folder);
                foreach (StoredTensor tensor in checkpoint.Tensors)
                    if (tensor is PackedTensor) tensor.ToFloats();
            }, Cases / 40);
    }

    private static void ReadAllTensors(string path)
    {
        using var file = SafetensorsFile.Open(path);
        foreach (var tensor in file.Tensors)
        {
            long sum = 0;
            foreach (byte value in tensor.Span) sum += value;
            Assert.That(sum, Is.GreaterThanOrEqualTo(0));
            _ = tensor.Shape;
        }
    }

    private static void RunAll(
        int seed, string path, long most, Func<Mutations, int, byte[]> mutate, Action<string> read,
        int cases = Cases)
    {
        var mutations = new Mutations(seed);
        int refused = 0;
        for (int number = 0; number < cases; number++)
        {
            byte[] bytes = mutate(mutations, number);
            File.WriteAllBytes(path, bytes);
            long before = GC.GetAllocatedBytesForCurrentThread();
            try
            {
                read(path);
            }
            catch (InputException refusal)
            {
                refused++;
                if (refusal.Message.Any(char.IsControl) || refusal.Message.Length > 4000)
                    Assert.Fail($"case {number}: {refusal.Message}");
            }
            catch (Exception other)
            {
                Assert.Fail($"case {number}: {other}\n{Encoding.UTF8.GetString(bytes)}");
            }

            long allocated = GC.GetAllocatedBytesForCurrentThread() - before;
            if (allocated > most) Assert.Fail($"case {number}: allocated {allocated:N0} bytes");
        }

        Assert.That(refused, Is.GreaterThan(cases / 4), "most mutations do damage");
    }
}
