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
        _arguments = new TrainArguments { OutputDir = Path.Combine(_root, "out") };
    }

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_root, recursive: true);

    [Test]
    public void ANewFolderIsMadeAndLogsAloneDoNotBlockIt()
    {
        Assert.That(Prepare(_arguments), Is.Null);
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
        Assert.That(RunFolder.Checkpoints(Folder), Is.Empty);
        Assert.That(() => Prepare(resume), Throws.TypeOf<InputException>()
            .With.Message.Contains("has no checkpoint"));
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
