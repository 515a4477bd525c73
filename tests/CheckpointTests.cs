using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed unsafe class CheckpointTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCaseSource(nameof(ReferenceFiles))]
    public void WrittenFilesEqualTheOriginalLibrarys(string original)
    {
        using var file = SafetensorsFile.Open(original);
        var random = new Random(5);
        TensorToSave[] tensors = [.. file.Tensors
            .Select(t => t.ToSave(t.Type))];
        random.Shuffle(tensors);
        SafetensorsWriter.Write(At("copy.safetensors"), tensors);
        Assert.That(File.ReadAllBytes(At("copy.safetensors")).AsSpan()
            .SequenceEqual(File.ReadAllBytes(original)));
        Assert.That(Directory.GetFiles(_folder), Has.Length.EqualTo(1));
    }

    // Committed files of the original library, or all of the full set;
    // BOOL and I8 are never written.
    private static IEnumerable<string> ReferenceFiles()
    {
        string? full = Environment.GetEnvironmentVariable("CPMX_REFERENCE");
        string[] folders = string.IsNullOrEmpty(full)
            ? [Path.Combine(ReferenceFile.Root, "safetensors"),
                Path.Combine(ReferenceFile.Root, "v26")] : [full];
        foreach (string path in folders.SelectMany(folder =>
            Directory.EnumerateFiles(folder, "*.safetensors", SearchOption.AllDirectories)))
        {
            using var file = SafetensorsFile.Open(path);
            if (file.Tensors.All(t =>
                t.StoredType.Kernel is not null && t.StoredType.Name != "BOOL"))
                yield return path;
        }
    }

    [Test]
    public void FloatsAreSavedInTheTypeAskedFor()
    {
        float[] values = [.. Enumerable.Range(0, 70000).Select(i => (i - 35000) / 8f)];
        fixed (float* data = values)
        {
            nint address = (nint)data;
            SafetensorsWriter.Write(At("f.safetensors"),
            [
                TensorToSave.Floats("half", DType.F16, new Shape(7, 10000), address),
                TensorToSave.Floats("float", DType.F32, new Shape(70000), address),
                TensorToSave.Floats("brain", DType.BF16, new Shape(2), address + (4 * 35001)),
                TensorToSave.Floats("one", DType.F64, new Shape(), address),
            ]);
        }

        using var file = SafetensorsFile.Open(At("f.safetensors"));
        Assert.That(file.Tensors.Select(t => t.Name),
            Is.EqualTo(new[] { "one", "float", "brain", "half" }));
        Assert.That(file.Get("float").ToFloats(), Is.EqualTo(values));
        Assert.That(file.Get("half").ToFloats(), Is.EqualTo(values.Select(v => (float)(Half)v)));
        Assert.That(file.Get("brain").ToFloats(), Is.EqualTo(new[] { 0.125f, 0.25f }));
        Assert.That(file.Get("one").ToFloats(), Is.EqualTo(new[] { -4375f }));
        Assert.Throws<ArgumentOutOfRangeException>(
            () => TensorToSave.Floats("i", DType.I32, new Shape(1), 0));
    }

    [Test]
    public void AFailedWriteLeavesTheOldFile()
    {
        File.WriteAllText(At("a.safetensors"), "old");
        var failing =
            new TensorToSave("a", DType.U8, new Shape(4), _ => throw new IOException("disk full"));
        Assert.That(() => SafetensorsWriter.Write(At("a.safetensors"), [failing]),
            Throws.TypeOf<RunException>().With.Message.EqualTo(
                $"{At("a.safetensors")}: cannot write: disk full"));
        var tooLittle = failing with { Write = stream => stream.Write([1, 2, 3]) };
        Assert.That(() => SafetensorsWriter.Write(At("a.safetensors"), [tooLittle]),
            Throws.InvalidOperationException.With.Message.EqualTo("a: wrote 3 bytes, expected 4"));
        Assert.That(() => SafetensorsWriter.Write(At("a.safetensors"), [tooLittle, tooLittle]),
            Throws.ArgumentException);
        Assert.That(File.ReadAllText(At("a.safetensors")), Is.EqualTo("old"));
        Assert.That(Directory.GetFiles(_folder), Has.Length.EqualTo(1));
        Assert.That(() => SafetensorsWriter.Write(At("no/such/a.safetensors"), []),
            Throws.TypeOf<RunException>().With.Message.StartWith(
                $"{At("no/such/a.safetensors")}: cannot write"));
    }

    // Sizes 8, 8, 40, 8, 8 with shards of 20: the third is larger than a shard and gets its own,
    // the fourth starts a new one (huggingface_hub's split_state_dict_into_shards).
    [Test]
    public void ShardsFollowTheOrderAndTheirIndexLeadsBack()
    {
        int[] counts = [2, 2, 10, 2, 2];
        var tensors = counts.Select((count, i) => Tensor($"t{i}", count)).ToList();
        CheckpointWriter.Write(_folder, tensors);
        Assert.That(Names(), Is.EqualTo(new[] { "model.safetensors" }));
        using (var single = Checkpoint.Open(_folder))
            Assert.That(single.Tensors.Select(t => t.Name),
                Is.EqualTo(tensors.Select(t => t.Name)));

        var written = CheckpointWriter.Write(_folder, tensors, 20);
        string[] expected =
            [.. Enumerable.Range(1, 3).Select(i => $"model-0000{i}-of-00003.safetensors"),
            "model.safetensors.index.json"];
        Assert.That(written, Is.EqualTo(expected));
        Assert.That(Names(), Is.EqualTo(expected));
        using var index = JsonDocument.Parse(File.ReadAllText(At("model.safetensors.index.json")));
        Assert.That(index.RootElement.GetProperty("metadata").GetProperty("total_size").GetInt64(),
            Is.EqualTo(72));
        var map = index.RootElement.GetProperty("weight_map").EnumerateObject()
            .Select(p => $"{p.Name} {p.Value.GetString()![10]}");
        Assert.That(map, Is.EqualTo(new[] { "t0 2", "t1 2", "t2 1", "t3 3", "t4 3" }));

        using var checkpoint = Checkpoint.Open(_folder);
        for (int i = 0; i < counts.Length; i++)
            Assert.That(checkpoint.Get($"t{i}").ToFloats(),
                Is.EqualTo(Enumerable.Repeat((float)counts[i], counts[i])));
        Assert.That(() => checkpoint.Get("t5"), Refuses("there is no tensor \"t5\""));
    }

    [TestCase("""{"weight_map": {"t0": "../model-00001-of-00002.safetensors"}}""",
        "key \"weight_map.t0\" is \"../model-00001-of-00002.safetensors\", expected a file name in "
            + "the same")]
    [TestCase("""{"weight_map": {"t0": "/etc/x.safetensors"}}""",
        "expected a file name in the same directory")]
    [TestCase("""{"weight_map": {"t0": "..\\x.safetensors"}}""",
        "expected a file name in the same directory")]
    [TestCase("""{"weight_map": {"t0": "passwd"}}""", "expected a file name in the same directory")]
    [TestCase("""{"weight_map": {"t0": 1}}""", "key \"weight_map.t0\" is 1, expected text")]
    [TestCase("""{"weight_map": []}""", "key \"weight_map\" is an array, expected an object")]
    [TestCase("""{}""", "key \"weight_map\" is missing")]
    [TestCase("""{"weight_map": {"t0": "absent.safetensors"}}""",
        "absent.safetensors: there is no such file")]
    [TestCase("""{"weight_map": {"t0": "model-00001-of-00002.safetensors", "t1": "model-00001-of-00002.safetensors"}}""",
        "1 tensors are not in their shards: t1 (expected in model-00001-of-00002.safetensors)")]
    [TestCase("""{"weight_map": {"t1": "model-00002-of-00002.safetensors", "t0": "model-00001-of-00002.safetensors", "t0": "x"}}""",
        "key \"weight_map.t0\" is there twice")]
    [TestCase("""{"weight_map": {}}""", null)]
    public void AnIndexThatDisagreesIsRefused(string index, string? expected)
    {
        CheckpointWriter.Write(_folder, [Tensor("t0", 2), Tensor("t1", 2)], 8);
        File.WriteAllText(At("model.safetensors.index.json"), index);
        if (expected is not null)
        {
            Assert.That(() => Checkpoint.Open(_folder), Refuses(expected));
            return;
        }

        using var empty = Checkpoint.Open(_folder);
        Assert.That(empty.Tensors, Is.Empty);
    }

    [Test]
    public void TensorsOfAShardThatTheIndexDoesNotListAreNamed()
    {
        CheckpointWriter.Write(_folder, [Tensor("t0", 2), Tensor("t1", 2), Tensor("t2", 2)], 16);
        File.WriteAllText(At("model.safetensors.index.json"), """
            {"weight_map": {"t0": "model-00001-of-00002.safetensors", "t2": "model-00002-of-00002.safetensors"}}
            """);
        Assert.That(() => Checkpoint.Open(_folder),
            Refuses("1 tensors of the shards are not listed for them: t1"));
    }

    [Test]
    public void DirectoriesWithoutWeightsSaySo()
    {
        Assert.That(() => Checkpoint.Open(At("none")), Refuses("there is no such directory"));
        Assert.That(() => Checkpoint.Open(_folder), Refuses("has neither model.safetensors nor"));
        File.WriteAllText(At("pytorch_model.bin"), "");
        Assert.That(() =>
            Checkpoint.Open(_folder), Refuses("convert its PyTorch .bin files to safetensors"));
    }

    [Test]
    public void AllDifferencesAreListedInOneError()
    {
        CheckpointWriter.Write(_folder,
            [Tensor("a", 2), Tensor("b", 3), Tensor("apm.x", 1), Tensor("y\u0001", 1),
            new TensorToSave("c", DType.I32, new Shape(1), s => s.Write(new byte[4]))]);
        using var checkpoint = Checkpoint.Open(_folder);
        ExpectedTensor[] expected =
            [new("a", new Shape(2)), new("b", new Shape(3, 1)), new("c", new Shape(1)),
            .. Enumerable.Range(0, 12).Select(i => new ExpectedTensor($"m{i}", new Shape(1)))];
        Assert.That(() => TensorMatch.Require(
                _folder, checkpoint.Tensors, expected, name => name == "apm.x" ? "audio" : null),
            Throws.TypeOf<InputException>().With.Message.EqualTo(
                $"{_folder}: the tensors do not fit:"
                + " 12 missing: m0, m1, m2, m3, m4, m5, m6, m7, m8, m9 and 2 more;"
                + " 2 unmatched: apm.x (audio), y\\u0001;"
                + " 1 misshaped: b [3] (expected [3, 1]);"
                + " 1 not of type F32, BF16, F16 or F64: c I32"));
    }

    [Test]
    public void MatchedTensorsComeInTheOrderOfTheExpectation()
    {
        CheckpointWriter.Write(_folder, [Tensor("a", 2), Tensor("b", 3)]);
        using var checkpoint = Checkpoint.Open(_folder);
        var matched = TensorMatch.Require(
            _folder, checkpoint.Tensors, [new("b", new Shape(3)), new("a", new Shape(2))]);
        Assert.That(matched.Select(t => t.Name), Is.EqualTo(new[] { "b", "a" }));
    }

    private static TensorToSave Tensor(string name, int count) =>
        new(name, DType.F32, new Shape(count), stream =>
    {
        for (int i = 0; i < count; i++) stream.Write(BitConverter.GetBytes((float)count));
    });

    private string At(string name) => Path.Combine(_folder, name);

    private string[] Names() =>
        [.. Directory.GetFiles(_folder).Select(p => Path.GetFileName(p)).Order()];
}
