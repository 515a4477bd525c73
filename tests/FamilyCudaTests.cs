using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Reference models of families on the GPU, in F32 with the CPU's bars, in BF16 with those of
/// <see cref="CudaModelTests"/>; PyTorch's own loss in BF16 is not recorded here, so the loss may
/// differ by one step of a BF16 number, 2^-7 of itself.
/// </summary>
[TestFixture("v2")]
[TestFixture("l3")]
public sealed class FamilyCudaTests(string name)
{
    private readonly FamilyCase _family = FamilyCase.Of(name);

    [TestCase(false)]
    [TestCase(true)]
    public void ReferenceTensorsAreReached(bool bf16)
    {
        TrainArguments arguments = _family.Full with { Bf16 = bf16, Device = DeviceChoice.Cuda };
        var expected = _family.Results.GetProperty("full");
        using var gpu = new CudaSource();
        using var model = TunedModel.Open(arguments, gpu.Source);
        Trace trace = Trace.Run(
            model, _family.Batch(arguments, _family.Pair), gradients: true);
        double loss = expected.GetProperty("loss").GetDouble();
        Assert.That(trace.Floats["loss"].Values[0],
            Is.EqualTo(loss).Within((bf16 ? 1.0 / 128 : 1e-5) * loss));
        foreach (JsonProperty tensor in _family.Json("activations.json").EnumerateObject())
        {
            if (!bf16) V26.AssertClose(tensor.Name, trace.Floats[tensor.Name], tensor.Value);
            var wanted = Fingerprint.Read(tensor.Value);
            double error = Fingerprint.Of(trace.Floats[tensor.Name].Values, wanted.Shape)
                .NormError(wanted);
            TestContext.Out.WriteLine($"{tensor.Name}: {error:E2} of its norm");
            Assert.That(error, Is.LessThan(4.0 / 256), tensor.Name);
        }

        var gradients = expected.GetProperty("gradients");
        // BF16 has noise of its own where the gradient is zero.
        // The norm before the resampler is at 0.0316 of its own, as sums of rounded p and ds fall.
        if (bf16) AssertGradients(model, gradients, 9.0 / 256);
        else V26.AssertGradients(model, gradients);
    }

    private static void AssertGradients(
        TunedModel model, JsonElement expected, double tolerance)
    {
        double worst = 0;
        foreach (JsonProperty tensor in expected.EnumerateObject())
        {
            if (V26.IsKeyBias(tensor.Name)) continue;
            var wanted = Fingerprint.Read(tensor.Value);
            double error = Fingerprint.Of(V26.Gradient(model, tensor.Name), wanted.Shape)
                .NormError(wanted);
            worst = Math.Max(worst, error);
            Assert.That(error, Is.LessThan(tolerance), tensor.Name);
        }

        TestContext.Out.WriteLine($"worst gradient: {worst:E2} of its norm");
    }
}
