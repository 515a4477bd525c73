using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// A run goes on from files of one save, with the settings, base model and random draws that they
/// were made with, or says what differs.
/// </summary>
[TestFixture]
public sealed class CheckpointPartsTests
{
    private string _folder = "";
    private TrainArguments _arguments = new();

    private string Newest => RunFolder.Checkpoint(_arguments.OutputDir, 2);

    [SetUp]
    public void TrainTwoSteps()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        _arguments = V26.Lora with
        {
            DataPath = Runs.Data(_folder, "one", "turns"),
            OutputDir = Path.Combine(_folder, "out"),
            LoraDropout = 0.1,
            MaxSteps = 2,
            SaveSteps = new Interval(1),
            LoggingSteps = new Interval(1),
        };
        Runs.Train(_arguments);
        _arguments = _arguments with { MaxSteps = 3, ResumeFromCheckpoint = new ResumePoint(null) };
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("optimizer.safetensors")]
    [TestCase("adapter_model.safetensors")]
    [TestCase("trainer_state.json")]
    [TestCase("run_state.json")]
    public void PartsOfAnotherStepAreRefused(string name)
    {
        File.Copy(Path.Combine(RunFolder.Checkpoint(_arguments.OutputDir, 1), name),
            Path.Combine(Newest, name), overwrite: true);
        Assert.That(Refusal(_arguments), Does.StartWith($"{Newest}: ")
            .And.Contain("files of one save only"));
    }

    [TestCase("optimizer.safetensors")]
    [TestCase("adapter_config.json")]
    public void APartThatIsMissingOrChangedIsNamed(string name)
    {
        string file = Path.Combine(Newest, name);
        byte[] bytes = File.ReadAllBytes(file);
        bytes[^(bytes.Length / 3)] ^= 1;
        File.WriteAllBytes(file, bytes);
        Assert.That(Refusal(_arguments), Does.StartWith(
            $"{Newest}: {name} is not the file that was saved with run_state.json"));
        File.Delete(file);
        Assert.That(Refusal(_arguments), Is.EqualTo($"{file}: there is no such file"));
    }

    [Test]
    public void ASnapshotWithoutOptimizerStateSaysWhatItIs()
    {
        File.Delete(Path.Combine(Newest, "run_state.json"));
        Assert.That(Refusal(_arguments), Does.Contain("without optimizer state (save_only_model)"));
    }

    [Test]
    public void AStepThatTheLogDoesNotKnowIsRefusedInOlderCheckpointsToo()
    {
        Change("run_state.json", json =>
        {
            json.Remove("parts");
            json["step"] = 1;
        });
        Assert.That(Refusal(_arguments), Does.Contain(
            "trainer_state.json is of step 2, run_state.json of step 1"));
    }

    // What changes the bits is refused, and said when it is allowed.
    [Test]
    public void OtherSettingsAreNamedAllTogether()
    {
        TrainArguments other = _arguments with
        {
            PerDeviceTrainBatchSize = 2,
            LoraDropout = 0.3,
            LearningRate = 1e-2,
            ModelMaxLength = 1000,
            DataSeed = 7,
        };
        string refusal = Refusal(other);
        Assert.That(refusal, Does.StartWith($"{Newest}: was made with "));
        foreach (string part in (string[])["model_max_length 2048, this run has 1000",
            "per_device_train_batch_size 1, this run has 2", "lora_dropout 0.1, this run has 0.3",
            "this run has 0.01", "data_seed 42, this run has 7"])
            Assert.That(refusal, Does.Contain(part));
        Assert.That(refusal, Does.EndWith("--allow_changes model_max_length lora_dropout "
            + "per_device_train_batch_size learning_rate data_seed"));
        Assert.That(Refusal(other with { AllowChanges = ["lora_dropout", "learning_rate"] }),
            Does.EndWith("--allow_changes model_max_length per_device_train_batch_size data_seed"));
        string said = Runs.Train(other with
        {
            AllowChanges = ["model_max_length", "lora_dropout", "per_device_train_batch_size",
                "learning_rate", "data_seed"],
        });
        Assert.That(said, Does.Contain("as allow_changes allows: it does not go on bit for bit")
            .And.Contain("its run was to have 2 steps, this one has 3"));
    }

    [Test]
    public void WhatChangesNoBitMayChange()
    {
        string said = Runs.Train(_arguments with
        {
            Threads = 1,
            GradientCheckpointing = true,
            DataloaderNumWorkers = 1,
            SaveTotalLimit = 1,
            DataSeed = _arguments.Seed,
            LoggingFirstStep = true,
        });
        Assert.That(said, Does.Not.Contain("bit for bit").And.Not.Contain("earlier version"));
    }

    [Test]
    public void AnotherBaseModelIsRefusedUnlessItIsAllowed()
    {
        string model = Path.Combine(_folder, "other");
        Directory.CreateDirectory(model);
        foreach (string file in Directory.GetFiles(_arguments.ModelNameOrPath!))
            File.Copy(file, Path.Combine(model, Path.GetFileName(file)));
        TrainArguments other = _arguments with { ModelNameOrPath = model };
        string weights = Path.Combine(model, "model.safetensors");
        byte[] bytes = File.ReadAllBytes(weights);
        bytes[bytes.Length / 2 / 4 * 4] ^= 1;
        File.WriteAllBytes(weights, bytes);
        Assert.That(Refusal(other), Does.Contain("was made with another base model than " + model)
            .And.EndWith("--allow_changes model_name_or_path"));
        Assert.That(Runs.Train(other with { AllowChanges = ["model_name_or_path"] }),
            Does.Contain("another base model"));
        bytes[bytes.Length / 2 / 4 * 4] ^= 1;
        File.WriteAllBytes(weights, bytes);
        Assert.That(Refusal(other), Does.Contain("another base model"), "than the last step's");
    }

    [Test]
    public void OtherRowsMayBeAllowed()
    {
        File.AppendAllText(_arguments.DataPath!, " ");
        Assert.That(Refusal(_arguments), Does.EndWith("--allow_changes data_path"));
        Assert.That(Runs.Train(_arguments with { AllowChanges = ["data_path"] }),
            Does.Contain("has other rows than"));
    }

    [TestCase(1)]
    [TestCase(null)]
    public void OtherDropoutMasksAreRefusedUnlessTheyAreAllowed(int? draws)
    {
        Change("run_state.json", json => json["draws"] = draws);
        Assert.That(Refusal(_arguments), Does.Contain("dropout draws other random numbers (1, this "
            + "one 2)")
            .And.EndWith("--allow_changes lora_dropout"));
        Assert.That(Runs.Train(_arguments with { AllowChanges = ["lora_dropout"] }),
            Does.Contain("draws other random numbers"));
    }

    [Test]
    public void OlderCheckpointsAndOtherProcessorsAreSaid()
    {
        Change("run_state.json", json => json["processor"] = "CPU, Portable");
        TrainArguments other = _arguments with
        {
            OutputDir = Path.Combine(_folder, "a"),
            ResumeFromCheckpoint = new ResumePoint(Newest),
        };
        Assert.That(Runs.Train(other), Does.Contain("was made on CPU, Portable; on CPU, "));
        Change("run_state.json", json =>
        {
            foreach (string key in (string[])["parts", "settings", "model", "processor",
                "max_steps"])
                json.Remove(key);
        });
        Assert.That(Runs.Train(_arguments), Does.Contain("was saved by an earlier version of "
            + "cpmx"));
    }

    [Test]
    public void KeysThatMayChangeMustExist() => Assert.That(
        () => TrainReader.Read(["--model_name_or_path", "m", "--data_path", "d",
            "--resume_from_checkpoint", "true", "--allow_changes", "learning_rat"], _folder),
        Throws.TypeOf<InputException>().With.Message.EqualTo("allow_changes: there is no key "
            + "\"learning_rat\" (did you mean \"learning_rate\"?)"));

    /// <summary>
    /// Masks of this version by the published numbers of Philox4x32-10 (Random123's known answers:
    /// counter and key of zeros). A change of them needs another <see cref="Philox.Version"/>.
    /// </summary>
    [Test]
    public void TheVersionOfTheMasksIsTheirs()
    {
        Assert.That(Philox.Version, Is.EqualTo(2));
        Assert.That(Philox.Draw((0, 0, 0, 0), (0, 0)),
            Is.EqualTo((0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u)));
        Assert.That(Philox.DrawnCols(129), Is.EqualTo(256));
        Assert.That(Philox.Threshold(0.1), Is.EqualTo(6554));
    }

    private static string Refusal(TrainArguments with) =>
        Assert.Throws<InputException>(() => Runs.Train(with))!.Message;

    private void Change(string name, Action<JsonObject> change)
    {
        string file = Path.Combine(Newest, name);
        JsonObject json = JsonNode.Parse(File.ReadAllText(file))!.AsObject();
        change(json);
        File.WriteAllText(file, json.ToJsonString());
    }
}
