using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>The model on the GPU, in BF16, against the official code under PyTorch.</summary>
[TestFixture]
public sealed class CudaModelTests
{
    private const double Allowed = 4.0 / 256;

    /// <summary>
    /// The loss may differ from PyTorch's in F32 by twice what PyTorch's own differs in BF16,
    /// an activation by four steps of a BF16 number, 2^-8 each, of its norm, and a gradient, with
    /// twice as many operations behind it, by eight.
    /// </summary>
    [Test]
    public void ReferenceTensorsAreReached()
    {
        TrainArguments arguments = V26.Full with { Bf16 = true, Device = DeviceChoice.Cuda };
        JsonElement expected = ReferenceText.Json("v26/forward/case_a.json");
        JsonElement activations = ReferenceText.Json("v26/forward/case_a_activations.json");
        using var gpu = new CudaSource();
        using var model = TunedModel.Open(arguments, gpu.Source);
        Trace trace = Trace.Run(model, V26.Batch(arguments, "one", "two-small"), gradients: true);
        double loss = expected.GetProperty("loss").GetDouble();
        double allowed = 2 * Math.Abs(expected.GetProperty("loss_bf16").GetDouble() - loss);
        TestContext.Out.WriteLine($"loss {trace.Floats["loss"].Values[0]}, {loss} +- {allowed:E1}");
        Assert.That(trace.Floats["loss"].Values[0], Is.EqualTo(loss).Within(allowed));
        int compared = 0;
        foreach (JsonProperty tensor in activations.EnumerateObject())
        {
            if (!trace.Floats.TryGetValue(tensor.Name, out var got)) continue;
            var wanted = Fingerprint.Read(tensor.Value);
            double error = Fingerprint.Of(got.Values, wanted.Shape).NormError(wanted);
            TestContext.Out.WriteLine($"{tensor.Name}: {error:E2}");
            Assert.That(error, Is.LessThan(Allowed), tensor.Name);
            compared++;
        }

        Assert.That(compared, Is.GreaterThan(8));
        double worst = 0;
        foreach (JsonProperty tensor in expected.GetProperty("gradients").EnumerateObject())
        {
            string name = V26.Name(tensor.Name);
            var wanted = Fingerprint.Read(tensor.Value);
            if (V26.IsKeyBias(name) || wanted.Norm == 0) continue;
            double error = Fingerprint.Of(V26.Gradient(model, name), wanted.Shape)
                .NormError(wanted);
            worst = Math.Max(worst, error);
            Assert.That(error, Is.LessThan(2 * Allowed), name);
        }

        TestContext.Out.WriteLine($"worst gradient: {worst:E2} of its norm");
    }
}
