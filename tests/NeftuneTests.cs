using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// NEFTune's noise (Jain et al. 2023): what is drawn, where it is added, and what it leaves alone.
/// Runs that go on with it: ResumeTests; memory: MemoryTests.
/// </summary>
[TestFixture]
public sealed class NeftuneTests
{
    private sealed class Embeddings(Device device) : ITensorProbe
    {
        public float[] Values { get; private set; } = [];

        public void Visit(string name, Tensor tensor)
        {
            if (name == "inputs_embeds") Values = device.ReadFloats(tensor);
        }
    }

    // The definition, number by number, of one counter at a time.
    private static float Number(Randomness random, long row, int col, int cols, float size)
    {
        long counter = (row * ((cols + 31) / 32 * 8)) + (col / 4);
        var (x0, x1, x2, x3) = Philox.Draw(
            ((uint)counter, uint.MaxValue, (uint)random.Step, (uint)(random.Step >> 32)),
            ((uint)random.Seed, (uint)(random.Seed >> 32)));
        uint word = (col % 4) switch { 0 => x0, 1 => x1, 2 => x2, _ => x3 };
        return (((word >> 8) / 8388608f) - 1) * size;
    }

    [TestCase(1)]
    [TestCase(31)]
    [TestCase(32)]
    [TestCase(100)]
    public void NumbersAreThoseOfTheDefinition(int cols)
    {
        var random = new Randomness(0x1234_5678_9ABC_DEF0, 0x1_0000_0005, true);
        var row = new float[cols];
        foreach (long at in (long[])[0, 7, 1 << 20])
        {
            Philox.Uniform(random, at, 0.25f, row);
            Assert.That(row, Is.EqualTo(
                Enumerable.Range(0, cols).Select(c => Number(random, at, c, cols, 0.25f))));
        }
    }

    // A uniform number in +-s has the mean 0 and the variance s * s / 3, whose own deviations over
    // n numbers are s / sqrt(3 n) and s * s * sqrt(4 / 45 / n): within four of them.
    [Test]
    public void NumbersAreUniform()
    {
        const int Count = 1 << 20;
        const double Size = 0.125;
        var row = new float[Count];
        Philox.Uniform(new(3, 9, true), 0, (float)Size, row);
        Assert.That(row, Is.All.InRange(-Size, Size));
        Assert.That(row.Average(x => (double)x),
            Is.Zero.Within(4 * Size / Math.Sqrt(3.0 * Count)));
        Assert.That(row.Average(x => (double)x * x),
            Is.EqualTo(Size * Size / 3).Within(4 * Size * Size * Math.Sqrt(4.0 / 45 / Count)));
        Assert.That(row.Distinct().Count(), Is.GreaterThan(0.9 * Count));
    }

    /// <summary>
    /// Text tokens have noise up to alpha / sqrt(tokens of the row * width), in V-2 times its
    /// scale_emb, as a hook on the embedding has it; picture features have none.
    /// </summary>
    [TestCase("v26")]
    [TestCase("v2")]
    public void NoiseIsOnTheEmbeddedTokensAlone(string family)
    {
        const double Alpha = 5;
        bool old = family == "v2";
        TrainArguments arguments = old ? FamilyCase.Of(family).Lora : V26.Lora;
        using var model = TunedModel.Open(arguments);
        Batch batch = old ? FamilyCase.Of(family).Batch(arguments, "one", "sliced")
            : V26.Batch(arguments, "one", "text1");
        double scale = 1;
        if (old)
        {
            using var config = JsonDocument.Parse(
                File.ReadAllBytes(Path.Combine(FamilyCase.Of(family).Model, "config.json")));
            scale = config.RootElement.GetProperty("scale_emb").GetDouble();
            Assert.That(scale, Is.Not.EqualTo(1));
        }

        model.Device.Random = new(8, 3, true);
        float[] plain = Embedded(0), noisy = Embedded(Alpha);
        Assert.That(Embedded(Alpha), Is.EqualTo(noisy));
        model.Device.Random = model.Device.Random with { Step = 4 };
        Assert.That(Embedded(Alpha), Is.Not.EqualTo(noisy));
        int width = plain.Length / batch.Tokens.Count;
        ReadOnlySpan<int> starts = batch.SequenceStarts.Span, slots = batch.Slots.Span;
        double largest = 0, bound = 0;
        for (int r = 0; r + 1 < starts.Length; r++)
        {
            var size = (float)(
                Alpha * scale / Math.Sqrt((double)(starts[r + 1] - starts[r]) * width));
            bound = Math.Max(bound, size);
            for (int t = starts[r]; t < starts[r + 1]; t++)
                for (int c = 0; c < width; c++)
                {
                    int i = (t * width) + c;
                    float noise = slots.Contains(t) ? 0
                        : Number(new(8, 3, true), t, c, width, size);
                    Assert.That(noisy[i], Is.EqualTo(plain[i] + noise), $"token {t}, column {c}");
                    largest = Math.Max(largest, Math.Abs(noise));
                }
        }

        Assert.That(largest, Is.InRange(0.99 * bound, bound));

        float[] Embedded(double alpha)
        {
            var probe = new Embeddings(model.Device);
            model.Model.NoiseAlpha = alpha;
            model.Loaded.Hidden(batch, probe);
            model.Graph.EndStep();
            model.Model.NoiseAlpha = 0;
            return probe.Values;
        }
    }

    [Test]
    public void OnlyTrainingHasNoise()
    {
        TrainArguments arguments = V26.Lora, noisy = arguments with { NeftuneNoiseAlpha = 5 };
        using var model = TunedModel.Open(arguments);
        Batch one = V26.Batch(arguments, "one"), two = V26.Batch(arguments, "text1");
        double asked = Asked();
        (double Loss, double Norm) plain = Step(arguments, 0, 1), first = Step(noisy, 0, 1);
        Assert.That(Step(arguments with { NeftuneNoiseAlpha = 0 }, 0, 1), Is.EqualTo(plain));
        Assert.That(first, Is.Not.EqualTo(plain));
        Assert.That(first.Loss, Is.EqualTo(plain.Loss).Within(0.2 * plain.Loss));
        Assert.That(Step(noisy, 0, 1), Is.EqualTo(first));
        Assert.That(Step(noisy, 0, 2), Is.EqualTo(first), "batches together");
        Assert.That(Step(noisy, 1, 1), Is.Not.EqualTo(first));
        Assert.That(Step(noisy with { Seed = 7 }, 0, 1), Is.Not.EqualTo(first));
        Assert.That(Asked(), Is.EqualTo(asked));

        (double, double) Step(TrainArguments with, int step, int together)
        {
            StepResult result =
                new Trainer(with with { GradientAccumulationSteps = 2 }, model)
                {
                    Together = together,
                }
                    .Step(step, [one, two], learningRate: 0);
            return (result.Loss, result.GradientNorm);
        }

        double Asked()
        {
            float loss = model.Device.ReadFloats(model.Loaded.Loss(one))[0];
            model.Graph.EndStep();
            return loss;
        }
    }

    /// <summary>Both devices have the same noise, rounded alike.</summary>
    [TestCase(false)]
    [TestCase(true)]
    public void TheGpuHasTheSameNoise(bool bf16)
    {
        TrainArguments arguments = V26.Lora with { Bf16 = bf16 };
        using var gpu = new CudaUnderTest();
        using var cpu = TunedModel.Open(arguments);
        using var cuda =
            TunedModel.Open(arguments with { Device = DeviceChoice.Cuda }, gpu.Devices);
        Batch batch = V26.Batch(arguments, "text0", "text1");
        float[] expected = Embedded(cpu), got = Embedded(cuda);
        // The processor's activations are F32: in BF16 noise and sum are rounded, each by 2^-9 of
        // it.
        Assert.That(got, Is.EqualTo(expected).Within(bf16 ? expected.Max(Math.Abs) / 256 : 0));
        Assert.That(got, Is.Not.EqualTo(Embedded(cuda, alpha: 0)));

        float[] Embedded(TunedModel model, double alpha = 5)
        {
            model.Device.Random = new(8, 3, true);
            model.Model.NoiseAlpha = alpha;
            model.Model.Load(batch, new BatchUpload(model.Device));
            float[] values = model.Device.ReadFloats(model.Model.Embedded(model.Graph));
            model.Graph.EndStep();
            return values;
        }
    }
}
