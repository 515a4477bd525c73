using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Reference models of families on the GPU against the CPU in F32, which
/// <see cref="ReferenceModelTests"/> holds to PyTorch: in F32 with its bars, in BF16 with those of
/// <see cref="CudaModelTests"/>. Where the reference's pictures are large, text alone goes through:
/// the vision tower and the joiner are V-2_6's.
/// </summary>
[TestFixture]
public sealed class ReferenceCudaTests
{
    [TestCase("o45", "turns", false)]
    [TestCase("o45", "turns", true)]
    [TestCase("v45", "text1", false)]
    [TestCase("v45", "text1", true)]
    public void TheTensorsOfTheCpuAreReached(string name, string row, bool bf16)
    {
        var reference = ReferenceModel.Of(name);
        Batch batch = reference.Batch(reference.Full, row);
        using var cpu = TunedModel.Open(reference.Full);
        Trace expected = Trace.Run(cpu, batch, gradients: true);
        using var gpu = new CudaSource();
        using var model = TunedModel.Open(
            reference.Full with { Bf16 = bf16, Device = DeviceChoice.Cuda }, gpu.Source);
        Trace trace = Trace.Run(model, batch, gradients: true);
        Assert.That(trace.Floats.Keys, Is.EquivalentTo(expected.Floats.Keys));
        double worst = 0;
        foreach (var (tensor, (_, values)) in expected.Floats)
        {
            float[] got = trace.Floats[tensor].Values;
            double[] wanted = Array.ConvertAll(values, v => (double)v);
            bool gradient = tensor.StartsWith("grad.", StringComparison.Ordinal);
            if (gradient && V26.IsKeyBias(tensor["grad.".Length..])) continue;
            if (gradient && wanted.All(v => v == 0))
            {
                Assert.That(got, Is.All.Zero, tensor);
                continue;
            }

            double error = bf16 || gradient
                ? V26.NormError(got, wanted) : V26.LargestError(got, wanted);
            if (gradient) worst = Math.Max(worst, error);
            double allowed = !bf16 ? gradient ? 1e-4 : 1e-5
                : tensor == "loss" ? 1.0 / 128 : (gradient ? 8.0 : 4.0) / 256;
            Assert.That(error, Is.LessThan(allowed), tensor);
        }

        TestContext.Out.WriteLine($"worst gradient: {worst:E2} of its norm");
    }
}
