using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

public sealed class RunFolderTests
{
    private string _root = "";
    private TrainArguments _arguments = new();

    private string Folder => _arguments.OutputDir;

    [SetUp]
    public void CreateFolder()
    {
        _root = Directory.CreateTempSubdirectory("cpmx-").FullName;
        _arguments = new TrainArguments
        {
            ModelNameOrPath = At("base"),
            DataPath = At("rows.json"),
            OutputDir = At("out"),
        };
    }

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_root, recursive: true);

    [Test]
    public void ANewFolderIsMadeAndLogsAloneDoNotBlockIt()
    {
        Assert.That(Prepare(_arguments), Is.Null);
        Assert.That(Directory.Exists(Folder), Is.False, "nothing was written");
        Directory.CreateDirectory(Folder);
        File.WriteAllText(Path.Combine(Folder, "train_args.json"), "{}");
        File.WriteAllText(Path.Combine(Folder, "train_log.jsonl"), "");
        Directory.CreateDirectory(Path.Combine(Folder, "runs"));
        Assert.That(Prepare(_arguments), Is.Null);
    }

    [Test]
    public void AUsedFolderIsRefusedUnlessItIsOverwrittenOrResumed()
    {
        MakeCheckpoints(5, 100, 20);
        Assert.That(() => Prepare(_arguments), Throws.TypeOf<InputException>()
            .With.Message.Contains("is not empty (it has checkpoint-100)"));
        var resume = _arguments with { ResumeFromCheckpoint = new ResumePoint(null) };
        Assert.That(Prepare(resume), Is.EqualTo(Path.Combine(Folder, "checkpoint-100")));
        Assert.That(Prepare(_arguments with { OverwriteOutputDir = true }), Is.Null);
        Assert.That(RunFolder.Checkpoints(Folder), Has.Count.EqualTo(3));
        Directory.Delete(Folder, recursive: true);
        Assert.That(() => Prepare(resume), Throws.TypeOf<InputException>()
            .With.Message.Contains("has no checkpoint"));
        Assert.That(Directory.Exists(Folder), Is.False, "made for nothing");
    }

    [Test]
    public void WhatIsOverwrittenGoesWhenTheFirstCheckpointStands()
    {
        MakeCheckpoints(5, 20);
        Write("trainer_state.json", "{}");
        Write("model-00001-of-00002.safetensors", "");
        Write("model.safetensors.index.json", "");
        Write("config.json", """{"model_type": "minicpmv"}""");
        Write("notes.txt", "mine");
        string[] before = Names();
        using (var folder = RunFolder.Open(_arguments with { OverwriteOutputDir = true }))
        {
            Assert.That(Names(), Is.EquivalentTo(before.Append("running.tmp")));
            string place = RunFolder.Checkpoint(Folder, 20);
            Directory.CreateDirectory(place + RunFolder.Unfinished);
            folder.Place(place + RunFolder.Unfinished, place);
        }

        Assert.That(Names(), Is.EquivalentTo(["checkpoint-20", "notes.txt"]));
        Assert.That(Directory.GetFiles(RunFolder.Checkpoint(Folder, 20)), Is.Empty, "the new one");
    }

    [Test]
    public void WhatIsOverwrittenGoesWhenTheResultStands()
    {
        MakeCheckpoints(5);
        Write("adapter_model.safetensors", "new");
        Write("model.safetensors", "");
        Write("config.json", """{"learning_rate": 1}""");
        using (var folder = RunFolder.Open(_arguments with { OverwriteOutputDir = true }))
            folder.Finish(["adapter_model.safetensors"]);
        Assert.That(Names(), Is.EquivalentTo(["adapter_model.safetensors", "config.json"]),
            "a configuration that is no model's is not the run's");
    }

    /// <summary>A run is killed while its first checkpoint takes the place of old ones.</summary>
    [TestCase("checkpoint-10.tmp", "checkpoint-5 checkpoint-7")]
    [TestCase("checkpoint-10", "checkpoint-10")]
    public void AKilledExchangeLeavesTheOldOnesOrTheNewOne(string made, string left)
    {
        MakeCheckpoints(7);
        Directory.CreateDirectory(Path.Combine(Folder, "checkpoint-5.old.tmp"));
        Directory.CreateDirectory(Path.Combine(Folder, made));
        if (!made.EndsWith(".tmp", StringComparison.Ordinal))
            Directory.Move(RunFolder.Checkpoint(Folder, 7),
                RunFolder.Checkpoint(Folder, 7) + ".old.tmp");
        Prepare(_arguments with { ResumeFromCheckpoint = new ResumePoint(null) });
        Assert.That(Names(), Is.EquivalentTo(left.Split(' ')));
    }

    [TestCase("model_name_or_path", "out/checkpoint-5")]
    [TestCase("model_name_or_path", "link-to-folder")]
    [TestCase("model_name_or_path", "folder-of-links")]
    [TestCase("lora_weight_path", "out/checkpoint-5")]
    [TestCase("lora_weight_path", "out")]
    [TestCase("data_path", "out/checkpoint-5/rows.json")]
    [TestCase("data_path", "link-to-rows")]
    [TestCase("data_path", "link-to-out/checkpoint-5/rows.json")]
    [TestCase("data_path", "out/trainer_state.json")]
    [TestCase("eval_data_path", "out/checkpoint-5/rows.json")]
    [TestCase("eval_data_path", "out/adapter_config.json")]
    public void WhatTheRunReadsIsNotWhatItRemoves(string key, string input)
    {
        MakeCheckpoints(5);
        string rows = Path.Combine(Folder, "checkpoint-5", "rows.json");
        File.WriteAllText(rows, "[]");
        Write("trainer_state.json", "{}");
        Write("adapter_config.json", "{}");
        Directory.CreateSymbolicLink(At("link-to-out"), Folder);
        Directory.CreateSymbolicLink(At("link-to-folder"), At("out/checkpoint-5"));
        File.CreateSymbolicLink(At("link-to-rows"), "link-to-out/checkpoint-5/rows.json");
        Directory.CreateDirectory(At("folder-of-links"));
        File.CreateSymbolicLink(At("folder-of-links/model.safetensors"),
            "../out/checkpoint-5/rows.json");
        TrainArguments with = _arguments with { OverwriteOutputDir = true, UseLora = true };
        with = key switch
        {
            "model_name_or_path" => with with { ModelNameOrPath = At(input) },
            "lora_weight_path" => with with { LoraWeightPath = At(input) },
            "data_path" => with with { DataPath = At(input) },
            _ => with with { EvalDataPath = At(input) },
        };
        string[] before = Names();
        Assert.That(() => Prepare(with), Throws.TypeOf<InputException>()
            .With.Message.StartsWith($"{key} {At(input)}").And.Message.Contains("choose another"));
        Assert.That(Names(), Is.EquivalentTo(before));
        using var folder = RunFolder.Open(with with
        {
            ModelNameOrPath = At("base"),
            DataPath = At("rows.json"),
            LoraWeightPath = null,
            EvalDataPath = null,
        });
        Assert.That(() => folder.MustKeep([At("a.png"), rows]), Throws.TypeOf<InputException>()
            .With.Message.StartsWith($"picture {rows} is in "));
    }

    [TestCase(false)]
    [TestCase(true)]
    public void TheModelsOwnFolderIsNoOutputFolder(bool lora)
    {
        Directory.CreateDirectory(At("model"));
        Directory.CreateSymbolicLink(Folder, "model");
        TrainArguments with = _arguments with
        {
            ModelNameOrPath = At("model"),
            OverwriteOutputDir = true,
            UseLora = lora,
        };
        Assert.That(() => Prepare(with), Throws.TypeOf<InputException>()
            .With.Message.Contains("is the folder of model_name_or_path"));
    }

    [Test]
    public void FilesOfKilledWritersGoAndThoseOfLivingOnesStay()
    {
        Directory.CreateDirectory(Folder);
        foreach (string name in (string[])["model.safetensors.17.tmp", "config.json.17.tmp",
            "train.json.18.tmp", "a.png.17.tmp", "notes.json.draft.tmp", "json.17.tmp.bak"])
            Write(name, "");
        using (new FileStream(
            Path.Combine(Folder, "train.json.18.tmp"), FileMode.Open, FileAccess.Write,
            FileShare.None))
            Prepare(_arguments with { OverwriteOutputDir = true });
        Assert.That(Names(), Is.EquivalentTo(["train.json.18.tmp", "a.png.17.tmp",
            "notes.json.draft.tmp", "json.17.tmp.bak"]));
    }

    [TestCase("adapter_model.safetensors", true)]
    [TestCase("train_log.jsonl", true)]
    [TestCase("report.html", true)]
    [TestCase("checkpoint-7", false)]
    public void WhatIsInAResultsPlaceIsNamed(string name, bool isFolder)
    {
        string path = Path.Combine(Folder, name);
        Directory.CreateDirectory(isFolder ? path : Folder);
        if (!isFolder) File.WriteAllText(path, "");
        Assert.That(() => Prepare(_arguments with { OverwriteOutputDir = true, UseLora = true }),
            Throws.TypeOf<InputException>().With.Message.EqualTo(isFolder
                ? $"output_dir: {path} is a folder where this run writes a file: move it away"
                : $"output_dir: {path} is a file where this run writes a checkpoint: move it "
                    + "away"));
    }

    [Test]
    public void LogsAreTriedBeforeAnythingElse()
    {
        File.WriteAllText(At("file"), "");
        Assert.That(() => Prepare(_arguments with { LoggingDir = At("file/logs") }),
            Throws.TypeOf<InputException>().With.Message.EqualTo(
                $"logging_dir {At("file/logs")}: {At("file")} is a file"));
        Assert.That(() => Prepare(_arguments with { LoggingDir = "/proc/logs" }),
            Throws.TypeOf<InputException>().With.Message.StartsWith("logging_dir /proc/logs: "));
        Assert.That(() => Prepare(_arguments with { OutputDir = At("file/out") }),
            Throws.TypeOf<InputException>().With.Message.Contains("cannot be used"));
        Assert.That(Directory.GetFileSystemEntries(_root), Is.EqualTo([At("file")]));
    }

    // Result 2 MiB, checkpoint 2 + 5.
    [TestCase(8.9, 1, null, "one checkpoint and the result take 9.0 MiB, 8.9 MiB are free")]
    [TestCase(9, 1, null, null)]
    [TestCase(22.9, 3, null, "3 checkpoints of 7.0 MiB and the result take 23.0 MiB")]
    [TestCase(23, 3, null, null)]
    [TestCase(20.9, 9, 2, "2 checkpoints of 7.0 MiB and the result take 21.0 MiB")]
    [TestCase(21, 9, 2, null)]
    [TestCase(0, 0, null, "the result takes 2.0 MiB, 0.0 MiB are free")]
    public void CheckpointsMustFitOnTheDisk(
        double free, int checkpoints, int? keep, string? expected)
    {
        TrainArguments with = _arguments with
        {
            SaveTotalLimit = keep,
            SaveStrategy = checkpoints == 0 ? When.No : When.Steps,
        };
        string? said;
        try
        {
            said = RunPlaces.MustHoldCheckpoints(
                with, new SavedBytes(2 << 20, 5 << 20), checkpoints, (long)(free * (1 << 20)));
        }
        catch (RunException refusal)
        {
            said = refusal.Message;
        }

        Assert.That(said, expected is null ? Is.Null : Does.Contain(expected));
        Assert.That(RunPlaces.Free(_root), Is.GreaterThan(0));
    }

    [Test]
    public void ARunGoesOnFromTheNewestCheckpointOfItsFolderOnly()
    {
        MakeCheckpoints(5, 10);
        string older = RunFolder.Checkpoint(Folder, 5), newest = RunFolder.Checkpoint(Folder, 10);
        var fromOlder = _arguments with { ResumeFromCheckpoint = new ResumePoint(older) };
        Assert.That(() => Prepare(fromOlder), Throws.TypeOf<InputException>()
            .With.Message.Contains("has checkpoint-10; remove what"));
        string other = fromOlder.OutputDir + "-2";
        Assert.That(Prepare(fromOlder with { OutputDir = other }), Is.EqualTo(older));
        var fromNewest = _arguments with { ResumeFromCheckpoint = new ResumePoint(newest + "/") };
        Assert.That(Prepare(fromNewest), Is.EqualTo(newest + "/"));
        Directory.Delete(newest, recursive: true);
        Assert.That(Prepare(fromOlder), Is.EqualTo(older));
    }

    [Test]
    public void UnfinishedCheckpointsAreNoCheckpointsAndGoAway()
    {
        MakeCheckpoints(5);
        string unfinished = RunFolder.Checkpoint(Folder, 10) + RunFolder.Unfinished;
        Directory.CreateDirectory(unfinished);
        var resume = _arguments with { ResumeFromCheckpoint = new ResumePoint(null) };
        Assert.That(Prepare(resume), Is.EqualTo(RunFolder.Checkpoint(Folder, 5)));
        Assert.That(Directory.Exists(unfinished), Is.False);
    }

    [Test]
    public void TheNewestCheckpointsAreKeptByNumberNotByName()
    {
        MakeCheckpoints(5, 100, 20);
        RunFolder.Rotate(Folder, null);
        Assert.That(RunFolder.Checkpoints(Folder).Select(c => c.Step), Is.EqualTo([5, 20, 100]));
        RunFolder.Rotate(Folder, 2);
        Assert.That(RunFolder.Checkpoints(Folder).Select(c => c.Step), Is.EqualTo([20, 100]));
        Assert.That(Directory.GetFileSystemEntries(Folder), Has.Length.EqualTo(2));
    }

    [Test]
    public void MissingOrImpossibleFoldersAreNamed()
    {
        File.WriteAllText(Folder, "");
        Assert.That(() => Prepare(_arguments), Throws.TypeOf<InputException>());
        string none = Path.Combine(_root, "none");
        var resume = _arguments with { ResumeFromCheckpoint = new ResumePoint(none) };
        File.Delete(Folder);
        Assert.That(() => Prepare(resume),
            Throws.TypeOf<InputException>().With.Message.Contains(none));
    }

    [Test]
    public void AFolderThatARunWritesToIsRefusedAndLeftAlone()
    {
        MakeCheckpoints(5);
        var resume = _arguments with { ResumeFromCheckpoint = new ResumePoint(null) };
        using (RunFolder.Open(resume))
        {
            Assert.That(() => Prepare(_arguments with { OverwriteOutputDir = true }),
                Throws.TypeOf<InputException>().With.Message.Contains(
                    "another run is writing to it"));
            Assert.That(RunFolder.Checkpoints(Folder), Has.Count.EqualTo(1));
        }

        Assert.That(Prepare(resume), Is.EqualTo(RunFolder.Checkpoint(Folder, 5)));
        Assert.That(Directory.GetFiles(Folder), Is.Empty);
    }

    private static string? Prepare(TrainArguments arguments)
    {
        using var folder = RunFolder.Open(arguments);
        return folder.ResumeFrom;
    }

    private string At(string name) => Path.Combine(_root, name);

    private void Write(string name, string text) =>
        File.WriteAllText(Path.Combine(Folder, name), text);

    private string[] Names() =>
        [.. Directory.GetFileSystemEntries(Folder).Select(p => Path.GetFileName(p))];

    private void MakeCheckpoints(params int[] steps)
    {
        foreach (int step in steps)
        {
            string path = RunFolder.Checkpoint(Folder, step);
            Directory.CreateDirectory(path);
            File.WriteAllText(Path.Combine(path, "adapter_config.json"), "{}");
        }
    }
}
