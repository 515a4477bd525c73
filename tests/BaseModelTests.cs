using System.Diagnostics;
using System.Security.Cryptography;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// A run does not depend on its model's folder and its data file once it trains: they are changed,
/// cut, moved and removed while it does. What is saved says what was trained with.
/// </summary>
[TestFixture]
public sealed class BaseModelTests
{
    private string _folder = "";
    private TrainArguments _arguments = new();

    private string Model => _arguments.ModelNameOrPath!;

    private string Weights => Path.Combine(Model, Checkpoint.SingleFile);

    [SetUp]
    public void CreateModel()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        string model = Directory.CreateDirectory(Path.Combine(_folder, "model")).FullName;
        foreach (string file in Directory.GetFiles(V26.Model))
            File.Copy(file, Path.Combine(model, Path.GetFileName(file)));
        string data = Path.Combine(_folder, "rows.json");
        File.WriteAllText(data, """
            [{"conversations": [{"role": "user", "content": "Count."},
              {"role": "assistant", "content": "One, two."}]}]
            """);
        // The vision tower is frozen, so that saves need the model's own weights.
        _arguments = V26.Full with
        {
            OfficialCompat = false,
            ModelNameOrPath = model,
            DataPath = data,
            OutputDir = Path.Combine(_folder, "out"),
            TuneVision = false,
            MaxSteps = 2,
            SaveSteps = new Interval(1),
            LoggingSteps = new Interval(1),
            LearningRate = 1e-3,
        };
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("renamed over")]
    [TestCase("removed")]
    [TestCase("folder moved")]
    public void FrozenWeightsAreThoseTrainedWith(string what)
    {
        byte[] other = File.ReadAllBytes(Weights);
        for (int i = other.Length / 2; i < other.Length; i++) other[i] ^= 1;
        Runs.Train(_arguments with { OutputDir = At("undisturbed") });
        string said = TrainWhile("step 1/", () =>
        {
            if (what == "removed") Directory.Delete(Model, recursive: true);
            else if (what == "folder moved") Directory.Move(Model, At("elsewhere"));
            else
            {
                File.WriteAllBytes(At("new"), other);
                File.Move(At("new"), Weights, overwrite: true);
            }
        });
        Assert.That(said, Does.Contain("done: 2 steps"));
        foreach (string name in (string[])["", "checkpoint-1", "checkpoint-2"])
            AssertSame(name, "model.safetensors", "config.json", "tokenizer.json", "merges.txt");
    }

    [TestCase("overwritten", When.Steps)]
    [TestCase("cut", When.Steps)]
    [TestCase("cut", When.No)]
    public void WeightsThatChangeInPlaceLoseNothingThatWasTrained(string what, When saving)
    {
        byte[] original = File.ReadAllBytes(Weights);
        Runs.Train(_arguments with { OutputDir = At("undisturbed") });
        _arguments = _arguments with { SaveStrategy = saving, OverwriteOutputDir = true };
        // Of an older run, which this one replaces.
        Directory.CreateDirectory(RunFolder.Checkpoint(_arguments.OutputDir, 2));
        var screen = new Watching("step 1/", () => Change(what));
        var failure = Assert.Throws<RunException>(() => Runs.Train(_arguments, screen: screen))!;
        Assert.That(failure.Message, Does.StartWith(
            $"{Model}: its weights were changed during the run").And.Contain("checkpoint-2"));
        Assert.That(screen.ToString(), Does.Contain("has what was trained alone"));
        Assert.That(File.Exists(Path.Combine(_arguments.OutputDir, "model.safetensors")), Is.False);
        File.WriteAllBytes(Weights, original);
        Runs.Train(_arguments with
        {
            OverwriteOutputDir = false,
            ResumeFromCheckpoint = new ResumePoint(null),
        });
        AssertSame("", "model.safetensors");
    }

    [TestCase(true)]
    [TestCase(false)]
    public void TheDataFileIsKnownByWhatWasRead(bool deleted)
    {
        string digest = Convert.ToHexStringLower(
            SHA256.HashData(File.ReadAllBytes(_arguments.DataPath!)));
        TrainWhile("step 1/", () =>
        {
            if (deleted) File.Delete(_arguments.DataPath!);
            else File.WriteAllText(_arguments.DataPath!, "[]");
        });
        string state = Path.Combine(_arguments.OutputDir, "checkpoint-2", RunState.FileName);
        Assert.That(File.ReadAllText(state), Does.Contain(digest));
    }

    [Test]
    public void StrangeFilesBesideTheWeightsArePassedOverAndNamed()
    {
        File.CreateSymbolicLink(Path.Combine(Model, "a.txt"), "../../blobs/0123");
        File.CreateSymbolicLink(Path.Combine(Model, "b.txt"), "b.txt");
        File.CreateSymbolicLink(Path.Combine(Model, "c.py"), "/dev/zero");
        using (var made = Process.Start("mkfifo", [Path.Combine(Model, "d.json")]))
            made.WaitForExit();
        using (FileStream huge = File.Create(Path.Combine(Model, "e.json")))
            huge.SetLength(3L << 30);
        File.WriteAllText(Path.Combine(Model, "f.txt"), "taken over");
        string said = Runs.Train(_arguments with { MaxSteps = 1, SaveStrategy = When.No });
        foreach (string name in (string[])["a.txt", "b.txt", "c.py", "d.json", "e.json"])
        {
            Assert.That(File.Exists(Path.Combine(_arguments.OutputDir, name)), Is.False);
            Assert.That(said.Split('\n').Single(line => line.Contains($"/{name}: ")),
                Does.EndWith("; it is not taken over into what is saved"));
        }

        Assert.That(File.ReadAllText(Path.Combine(_arguments.OutputDir, "f.txt")),
            Is.EqualTo("taken over"));
    }

    [TestCase("overwritten")]
    [TestCase("cut")]
    public void AFileThatChangesWhileItIsReadIsRefusedInOneLine(string what)
    {
        using var checkpoint = Checkpoint.Open(Model);
        _ = checkpoint.Tensors.First().Data;
        Change(what);
        Assert.That(() => checkpoint.Tensors.Last().ToFloats(), SafetensorsTests.Refuses(
            $"{Weights}: was changed or cut while it was in use"));
        Assert.That(() => checkpoint.Tensors.Last().Data, Throws.TypeOf<InputException>());
    }

    // The slicing that is trained with is config.json's with the configuration's number; what the
    // saved processor says must lead to the same. Values: the number, config.json's slice_config,
    // slice_mode of both files, official_compat.
    [TestCase(1, 9, true, true, false)]
    [TestCase(4, 9, true, true, false)]
    [TestCase(9, 9, true, true, false)]
    [TestCase(4, 0, true, false, false)]
    [TestCase(4, 9, false, true, true)]
    public void WhatWasTrainedWithIsWhatIsSaved(
        int number, int configured, bool mode, bool processorMode, bool official)
    {
        Edit("config.json", json =>
        {
            json["slice_mode"] = mode;
            json["use_image_id"] = false;
            json["dtype"] = "bfloat16";
            if (configured == 0) json.Remove("slice_config");
        });
        Edit("preprocessor_config.json", json =>
        {
            json["slice_mode"] = processorMode;
            json["scale_resolution"] = 224;
        });
        Runs.Train(_arguments with
        {
            MaxSliceNums = number,
            OfficialCompat = official,
            // Officially every row has a picture.
            DataPath = official ? Runs.Data(_folder, "one") : _arguments.DataPath,
            MaxSteps = 1,
            SaveStrategy = When.No,
        });
        JsonObject config = Read("config.json"), processor = Read("preprocessor_config.json");
        Assert.That((string?)config["dtype"], Is.EqualTo("float32"));
        Assert.That((bool?)config["slice_mode"], Is.EqualTo(mode));
        if (mode)
            Assert.That((int?)config["slice_config"]?["max_slice_nums"], Is.EqualTo(number));
        int slices = (bool)processor["slice_mode"]! ? (int)processor["max_slice_nums"]! : 1;
        Assert.That(slices, Is.EqualTo(mode ? number : 1));
        // A folder without slice_config has the class's own 448.
        Assert.That((int?)processor["scale_resolution"], Is.EqualTo(448));
        // The official script numbers pictures whatever use_image_id says.
        Assert.That((bool?)processor["use_image_id"], Is.True);
        Assert.That((bool?)config["use_image_id"], Is.True);
    }

    [TestCase(false)]
    [TestCase(true)]
    public void AResultOfOneKindReplacesTheOther(bool loraFirst)
    {
        TrainArguments full = _arguments with { MaxSteps = 1 };
        TrainArguments lora = V26.Lora with
        {
            OfficialCompat = false,
            DataPath = full.DataPath,
            OutputDir = full.OutputDir,
            MaxSteps = 1,
        };
        TrainArguments first = loraFirst ? lora : full, second = loraFirst ? full : lora;
        Runs.Train(first);
        Runs.Train(second with { OverwriteOutputDir = true, SaveStrategy = When.No });
        string[] names = [.. Directory.GetFileSystemEntries(full.OutputDir)
            .Select(p => Path.GetFileName(p))];
        string[] adapter = [AdapterFile.WeightsName, AdapterConfig.FileName],
            model = [Checkpoint.SingleFile, "config.json"];
        Assert.That(names, Is.SupersetOf(loraFirst ? model : adapter));
        Assert.That(names.Intersect(loraFirst ? adapter : model), Is.Empty);
        Assert.That(RunFolder.Checkpoints(full.OutputDir), Is.Empty);
    }

    [Test]
    public void CheapChecksComeBeforeRowsAreRead()
    {
        Directory.CreateDirectory(_arguments.OutputDir);
        File.WriteAllText(Path.Combine(_arguments.OutputDir, "mine"), "");
        File.WriteAllText(_arguments.DataPath!, "no rows");
        Assert.That(() => Runs.Train(_arguments), Throws.TypeOf<InputException>()
            .With.Message.Contains("is not empty (it has mine)"));
        Assert.That(() => Runs.Train(_arguments with { OutputDir = At("new/deep") }),
            Throws.TypeOf<InputException>().With.Message.Contains("is neither a JSON list"));
        Assert.That(Directory.Exists(At("new")), Is.False);
    }

    [Test]
    public void ADeviceThatTheWeightsDoNotFitOnIsRefused()
    {
        using var source = BaseModel.Open(_arguments with { Bf16 = true });
        using var device = new CpuDevice(threads: 1);
        long needed = source.DeviceBytes;
        void Try(long? free, bool isOpen) => source.MustFitOn(
            new OpenDevice(device, "Card") { FreeBytes = free }, _arguments, isOpen);
        Try(needed, isOpen: false);
        Try(null, isOpen: false);
        Assert.That(() => Try(needed - 1, isOpen: false),
            Throws.TypeOf<RunException>().With.Message.Match(
                "^out of memory: weights, .* take .* MiB, .* MiB are free on Card; bf16, "));
        // What may go into the machine's memory is not in the way.
        Try(needed - 1, isOpen: true);
        Assert.That(() => Try(1000, isOpen: true), Throws.TypeOf<RunException>());
        TunedModel.Load(source, new OpenDevice(device, "x"), _arguments with { Bf16 = true });
        Assert.That(needed, Is.InRange(0.9 * device.AllocatedBytes, device.AllocatedBytes));
    }

    // By another program, which knows nothing of .NET's locks.
    private void Change(string what)
    {
        string[] command = what == "cut"
            ? ["truncate", "-s", "100000", Weights]
            : ["dd", "if=/dev/zero", $"of={Weights}", "bs=1M", "count=1", "conv=notrunc",
                "status=none"];
        using var process = Process.Start(command[0], command[1..]);
        process.WaitForExit();
    }

    private string At(string name) => Path.Combine(_folder, name);

    private void AssertSame(string place, params string[] names)
    {
        foreach (string name in names)
            Assert.That(File.ReadAllBytes(Path.Combine(_arguments.OutputDir, place, name)).AsSpan()
                .SequenceEqual(File.ReadAllBytes(Path.Combine(At("undisturbed"), place, name))),
                Is.True, $"{place}/{name}");
    }

    private string TrainWhile(string text, Action change) =>
        Runs.Train(_arguments, screen: new Watching(text, change));

    private void Edit(string name, Action<JsonObject> edit)
    {
        string path = Path.Combine(Model, name);
        JsonObject json = JsonNode.Parse(File.ReadAllBytes(path))!.AsObject();
        edit(json);
        File.WriteAllText(path, json.ToJsonString());
    }

    private JsonObject Read(string name) => JsonNode.Parse(
        File.ReadAllBytes(Path.Combine(_arguments.OutputDir, name)))!.AsObject();

    /// <summary>A screen that does something when a text appears on it first.</summary>
    private sealed class Watching(string text, Action change) : StringWriter
    {
        private bool _done;

        public override void Flush()
        {
            if (_done || !ToString().Contains(text, StringComparison.Ordinal)) return;
            _done = true;
            change();
        }
    }
}
