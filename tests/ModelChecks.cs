using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>What must hold of every model, whatever its family.</summary>
internal static class ModelChecks
{
    /// <summary>Steps over these batches allocate nothing once each has run.</summary>
    public static void AssertWarmStepsAllocateNothing(TrainArguments arguments, Batch[][] steps)
    {
        using var model = TunedModel.Open(arguments);
        var trainer = new Trainer(arguments, model);
        var bytes = new long[steps.Length];
        // The first round meets every shape.
        for (int step = 0; step < 2 * steps.Length; step++)
        {
            long before = GC.GetAllocatedBytesForCurrentThread();
            StepResult result = trainer.Step(step, steps[step % steps.Length], 1e-5);
            bytes[step % steps.Length] = GC.GetAllocatedBytesForCurrentThread() - before;
            Assert.That(result.Skipped, Is.False);
        }

        Assert.That(bytes, Is.All.Zero);
    }

    /// <summary>Checkpointing changes no bit of loss and gradients, and takes less
    /// memory.</summary>
    public static void AssertCheckpointingGivesTheSameBits(TrainArguments full, Batch batch)
    {
        var results = new List<(double Loss, float[] Gradients, long Peak)>();
        foreach (bool checkpointing in (bool[])[false, true])
        {
            TrainArguments arguments = full with { GradientCheckpointing = checkpointing };
            using var model = TunedModel.Open(arguments);
            double loss = V26.Gradients(model, arguments, batch).Loss;
            results.Add((loss, V26.AllGradients(model),
                model.Graph.PeakBytes));
        }

        Assert.That(results[1].Loss, Is.EqualTo(results[0].Loss));
        Assert.That(results[1].Gradients.AsSpan().SequenceEqual(results[0].Gradients), Is.True);
        Assert.That(results[1].Peak, Is.LessThan(results[0].Peak), "bytes");
    }
}
