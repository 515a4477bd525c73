using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Updates;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Runs with the optimizers that are not torch's AdamW.</summary>
[TestFixture]
public sealed class OptimizerTrainTests
{
    /// <summary>
    /// The language model of the reference model learns two rows of text; its matrices are large
    /// enough for moments of 8 bits, its vectors and its embeddings keep 32.
    /// </summary>
    [TestCase(OptimizerKind.Adamw8bit, 1e-3)]
    [TestCase(OptimizerKind.PagedAdamw32bit, 1e-3)]
    [TestCase(OptimizerKind.Lion, 1e-4)]
    [TestCase(OptimizerKind.PagedLion8bit, 1e-4)]
    [TestCase(OptimizerKind.Sgd, 1)]
    [TestCase(OptimizerKind.Adafactor, 1e-3)]
    public void TenStepsLearn(OptimizerKind optim, double rate)
    {
        TrainArguments arguments =
            V26.Full with { Optim = optim, TuneVision = false, TuneLlm = true, WeightDecay = 0.1 };
        using var model = TunedModel.Open(arguments);
        var trainer = new Trainer(arguments, model);
        Batch batch = V26.Batch(arguments, "text0", "text1");
        double[] losses = [.. Enumerable.Range(0, 10)
            .Select(i => trainer.Step(i, [batch], rate).Loss)];
        TestContext.Out.WriteLine(string.Join(' ', losses.Select(l => l.ToString("F3"))));
        Assert.That(losses[^1], Is.LessThan(0.8 * losses[0]));
        OptimizerForm form = model.ParameterRanges.Optimizer;
        foreach (TunedTensor tensor in model.ParameterRanges.List)
        {
            bool small = tensor.Shape.Count < 4096
                || tensor.Name.EndsWith("embed_tokens.weight", StringComparison.Ordinal);
            foreach (var (name, state) in model.ParameterRanges.States(tensor.Name))
                if (name.EndsWith("_moment", StringComparison.Ordinal))
                    Assert.That(state.Type,
                        Is.EqualTo(small ? DType.F32 : form.Moments), $"{name} of {tensor.Name}");
        }

        Assert.That(model.ParameterRanges.List.Select(t => t.MomentsOf(form)), Has.Some.EqualTo(form.Moments));
    }

    /// <summary>
    /// On the GPU, with moments in its own memory and in the machine's: the CPU's losses, and the
    /// same bits in both.
    /// </summary>
    [Test]
    public void PagedMomentsAreThoseOfTheDevice()
    {
        StepResult[] cpu = Steps(OptimizerKind.Adamw8bit, null, out _, out _), gpu, paged;
        long held, heldPaged, host;
        using (var cuda = new CudaSource())
            gpu = Steps(OptimizerKind.Adamw8bit, cuda.Source, out held, out _);
        using (var cuda = new CudaSource())
            paged = Steps(OptimizerKind.PagedAdamw8bit, cuda.Source, out heldPaged, out host);
        for (int i = 0; i < cpu.Length; i++)
        {
            Assert.That(gpu[i].Loss, Is.EqualTo(cpu[i].Loss).Within(1e-4 * cpu[i].Loss));
            Assert.That(paged[i].Loss, Is.EqualTo(gpu[i].Loss));
        }

        Assert.That(cpu[^1].Loss, Is.LessThan(cpu[0].Loss));
        Assert.That(host, Is.Positive.And.EqualTo(held - heldPaged));
    }

    private static StepResult[] Steps(
        OptimizerKind optim, DeviceSource? devices, out long held, out long host)
    {
        TrainArguments arguments = V26.Lora with
        {
            Optim = optim,
            LoraR = 64,
            Device = devices is null ? DeviceChoice.Cpu : DeviceChoice.Cuda,
        };
        using var model = TunedModel.Open(arguments, devices);
        Assert.That(model.ParameterRanges.List.Select(
            t => t.MomentsOf(model.ParameterRanges.Optimizer)), Has.Some.EqualTo(DType.U8));
        (held, host) = (model.ParameterRanges.Bytes, model.ParameterRanges.HostBytes);
        var trainer = new Trainer(arguments, model);
        Batch text = V26.Batch(arguments, "text0", "text1");
        return [.. Enumerable.Range(0, 3).Select(i => trainer.Step(i, [text], 1e-3))];
    }
}
