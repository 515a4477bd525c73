using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What a training step leaves behind: nothing, on the managed heap and on the device.
/// </summary>
[TestFixture]
public sealed class MemoryTests
{
    [TestCase("lora_checkpointed")]
    [TestCase("full")]
    [TestCase("full_bf16_checkpointed")]
    public void AWarmStepAllocatesNothing(string name)
    {
        bool lora = name.StartsWith("lora", StringComparison.Ordinal);
        TrainArguments arguments = (lora
            ? V26.Lora with { LoraDropout = 0.1, NeftuneNoiseAlpha = 5 } : V26.Full) with
        {
            GradientCheckpointing = name.EndsWith("checkpointed", StringComparison.Ordinal),
            Bf16 = name.Contains("bf16"),
            GradientAccumulationSteps = 2,
        };
        using var model = TunedModel.Open(arguments);
        var trainer = new Trainer(arguments, model);
        Batch one = V26.Batch(arguments, "one"), two = V26.Batch(arguments, "text1", "turns"),
            text = V26.Batch(arguments, "text0", "text1");
        Batch[][] steps = [[one, two], [text], [two], [text, one]];
        int step = 0;
        var bytes = new long[steps.Length];
        // The first round meets every shape.
        for (int round = 0; round < 2; round++)
        {
            for (int i = 0; i < steps.Length; i++)
            {
                Batch[] batches = steps[i];
                long before = GC.GetAllocatedBytesForCurrentThread();
                StepResult result = trainer.Step(step++, batches, 1e-5);
                bytes[i] = GC.GetAllocatedBytesForCurrentThread() - before;
                Assert.That(result.Skipped, Is.False);
                Assert.That(model.Device.Step.IsEmpty, Is.True);
                Assert.That(model.Device.Step.Used, Is.Zero);
                Assert.That(model.Graph.Length, Is.Zero);
            }
        }

        Assert.That(bytes, Is.All.Zero);
    }

    [Test]
    public void WarmStepsAllocateNothingOnAnyThread()
    {
        using var model = TunedModel.Open(V26.Lora);
        var trainer = new Trainer(V26.Lora, model);
        Batch[] batches = [V26.Batch(V26.Lora, "one")];
        long least = long.MaxValue;
        // The test runner's own threads may allocate now and then; never in all of ten steps.
        for (int step = 0; step < 14; step++)
        {
            long before = GC.GetTotalAllocatedBytes(precise: true);
            trainer.Step(step, batches, 1e-5);
            long bytes = GC.GetTotalAllocatedBytes(precise: true) - before;
            if (step >= 4) least = Math.Min(least, bytes);
        }

        Assert.That(least, Is.Zero);
    }

    [Test]
    public void DeviceMemoryDoesNotGrowWithSteps()
    {
        using var model = TunedModel.Open(V26.Lora);
        var trainer = new Trainer(V26.Lora, model);
        Batch small = V26.Batch(V26.Lora, "one"), large = V26.Batch(V26.Lora, "three");
        trainer.Step(0, [large], 1e-5);
        long allocated = ((CpuDevice)model.Device).AllocatedBytes, peak = model.Graph.PeakBytes;
        for (int step = 1; step < 6; step++)
        {
            trainer.Step(step, [step % 2 == 0 ? large : small], 1e-5);
            Assert.That(((CpuDevice)model.Device).AllocatedBytes, Is.EqualTo(allocated));
            Assert.That(model.Graph.PeakBytes, Is.EqualTo(peak));
        }
    }

    [TestCase(true)]
    [TestCase(false)]
    public void FrozenWeightsTakeTheirFileSizeOnce(bool bf16)
    {
        using var model = TunedModel.Open(V26.Lora with { Bf16 = bf16 });
        long allocated = ((CpuDevice)model.Device).AllocatedBytes;
        // Values, gradients and two moments of the adapters, all F32, with a little padding.
        long trained = 16 * model.ParameterRanges.Count;
        long frozen = V26.Spec.Parameters.All.Sum(p => 2 * p.Shape.Count);
        TestContext.Out.WriteLine($"{allocated - trained:N0} bytes for {frozen:N0} in the file");
        // Norms and biases are widened, and panels of packed matrices filled up: some percent here,
        // where the widest matrix has 576 rows. Rotary and coordinate tables are made per batch.
        Assert.That(allocated - trained, Is.InRange(frozen, 1.03 * frozen));
    }
}
