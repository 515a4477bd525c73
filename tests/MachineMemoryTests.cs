using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What a GPU's run keeps in the machine's memory is compared with what is free there before
/// anything is loaded.
/// </summary>
[TestFixture]
public sealed class MachineMemoryTests
{
    private string _folder = "";
    private TrainArguments _arguments = null!;

    [SetUp]
    public void WriteRows()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        _arguments = Runs.OneRow(_folder) with
        {
            Device = DeviceChoice.Cuda,
            MaxSteps = 1,
        };
    }

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    /// <summary>Beside each, what is said to be open.</summary>
    [TestCase("stream", "stream_weights=false, q_lora=true")]
    [TestCase("optimizer", "offload_optimizer=false, optim=adamw_8bit")]
    [TestCase("paged", "an end of other programs, optim=adamw_8bit")]
    [TestCase("param",
        "offload_param=false, offload_optimizer=false, optim=adamw_8bit, use_lora=true")]
    public void TooLittleIsSaidBeforeAnythingIsLoaded(string name, string open)
    {
        TrainArguments arguments = name switch
        {
            "stream" => _arguments with { StreamWeights = StreamedWeights.True },
            "optimizer" => _arguments with { OffloadOptimizer = true },
            "paged" => _arguments with { Optim = OptimizerKind.PagedAdamw32bit },
            _ => V26.Full with
            {
                OfficialCompat = false,
                Device = DeviceChoice.Cuda,
                DataPath = _arguments.DataPath,
                OutputDir = _arguments.OutputDir,
                OffloadOptimizer = true,
                OffloadParam = true,
            },
        };
        var asked = new List<long>();
        DeviceSource Machine(long free) => new StubCuda().Devices with
        {
            MachineBytes = () =>
            {
                asked.Add(free);
                return free;
            },
        };
        var failure = Assert.Throws<RunException>(
            () => Runs.Train(arguments, devices: Machine(1 << 10)))!;
        TestContext.Out.WriteLine(failure.Message);
        Assert.That(failure.Message, Does.StartWith("out of memory: the run needs ")
            .And.Contains(
                " MiB of the machine's memory, 0.0 MiB are free; in the machine's memory: ")
            .And.Contains("; open are an end of other programs, ")
            .And.EndsWith(open).And.Not.Contain("\n"));
        Assert.That(Directory.Exists(arguments.OutputDir), Is.False);
        Assert.That(asked, Is.EqualTo([1L << 10]), "asked for once");
        Runs.Train(arguments, devices: Machine(1 << 30));
        Assert.That(File.Exists(Path.Combine(arguments.OutputDir, "train_log.jsonl")));
    }

    /// <summary>A run that keeps nothing there asks for nothing.</summary>
    [Test]
    public void WhatLiesOnTheGpuNeedsNone() => Assert.That(
        () => Runs.Train(_arguments,
            devices: new StubCuda().Devices with { MachineBytes = () => 0 }), Throws.Nothing);

    [Test]
    public void WhatIsFreeIsLessThanThereIs() => Assert.That(MachineMemory.Free(),
        Is.GreaterThan(1 << 20).And.LessThan(GC.GetGCMemoryInfo().TotalAvailableMemoryBytes));
}
