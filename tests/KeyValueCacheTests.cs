using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Whole models over a cache of keys and values: a prompt with its pictures, then token by token,
/// has the logits of all tokens at once.
/// </summary>
[TestFixture]
public sealed class KeyValueCacheTests
{
    [Test]
    public void TokenByTokenEqualsTheWhole() => AssertStepsEqualTheWhole(
        V26.Spec, DType.BF16, V26.Batch(V26.Full, "one", "text1"));

    [Test]
    public void TwoPicturesOfDifferentSequencesAreTakenAtOnce() => AssertStepsEqualTheWhole(
        V26.Spec, DType.F32, V26.Batch(V26.Full, "two-small", "one", "text0"));

    [TestCase("v2")]
    [TestCase("l3")]
    public void FamiliesHaveTheirScales(string name)
    {
        var family = FamilyCase.Of(name);
        AssertStepsEqualTheWhole(
            family.Spec, DType.F32, family.Batch(family.Full, "text", "one"));
    }

    // Any tokens do: those of V-2_6's rows are in this vocabulary too, and the grids are the same.
    [Test]
    public void NormalisedKeysAreCached()
    {
        ModelSpec spec = ModelSpec.Read(Path.Combine(ReferenceFile.Root, "v45", "model"));
        Assert.That(spec.Decoder.QkNorm, Is.True);
        AssertStepsEqualTheWhole(spec, DType.BF16, V26.Batch(V26.Full, "one", "text1"));
    }

    [TestCase(DType.F32, "text0")]
    [TestCase(DType.BF16, "one")]
    public void OnCudaTokenByTokenEqualsTheWhole(DType type, string first)
    {
        Batch whole = V26.Batch(V26.Full, first, "text1");
        float[] exact;
        using (LoadedModel cpu = Open(V26.Spec, DType.F32)) exact = Logits(cpu, whole);
        using var cuda = new CudaSource();
        using LoadedModel model = Open(V26.Spec, type, cuda.Source);
        double[] expected = Array.ConvertAll(exact, v => (double)v);
        double error = V26.LargestError(Logits(model, whole), expected);
        // Both round alike, so the error may be twice that of the whole.
        int prompt = whole.Slots.Count > 0 ? whole.Slots[^1] + 1 : 20;
        AssertSteps(model, whole, exact, [[prompt, 5], [1, 1], [1, 0], [3, 1]], (2 * error) + 1e-5);
    }

    [Test]
    public void ABatchThatDoesNotFitIsNamedAndNothingTaken()
    {
        using LoadedModel model = Open(V26.Spec, DType.BF16);
        var cache = new KeyValueCache(model.Device, model.Spec.Decoder, 2, 30);
        Batch whole = V26.Batch(V26.Full, "text0", "text1");
        model.Hidden(Part(whole, [0, 0], [20, 28]), cache: cache);
        model.Graph.EndStep();
        Assert.That(() => model.Hidden(Part(whole, [20, 28], [21, 31]), cache: cache),
            Throws.TypeOf<ShapeException>().With.Message.EqualTo(
                "key/value cache: 3 tokens for sequence 1, which has 28 of at most 30"));
        Assert.That(() => model.Hidden(V26.Batch(V26.Full, "text0"), cache: cache),
            Throws.TypeOf<ShapeException>().With.Message.EqualTo(
                "key/value cache: a batch of 1 sequences, expected 2, those of the cache"));
        Assert.That(cache.Lengths.ToArray(), Is.EqualTo((int[])[20, 28]));
    }

    [Test]
    public void ALoadedModelHasWhatMakesRows()
    {
        using LoadedModel model = Open(V26.Spec, DType.BF16);
        Assert.That(model.Tokenizer.Encode("A star."), Is.EqualTo(
            V26.Format.Tokenizer.Encode("A star.")));
        Assert.That(model.Rows.Vocabulary, Is.EqualTo(V26.Spec.Decoder.VocabSize));
        Assert.That(model.Rows, Is.SameAs(model.Rows));
    }

    private static void AssertStepsEqualTheWhole(ModelSpec spec, DType storage, Batch whole)
    {
        using LoadedModel model = Open(spec, storage);
        float[] expected = Logits(model, whole);
        int sequences = whole.SequenceStarts.Count - 1;
        // Of each sequence the tokens up to the end of its last picture, then some at once for the
        // first sequence alone, then one after the other until all have ended.
        var prompt = new int[sequences];
        for (int s = 0; s < sequences; s++)
        {
            prompt[s] = 5;
            foreach (int slot in whole.Slots.Span)
                if (slot >= whole.SequenceStarts[s] && slot < whole.SequenceStarts[s + 1])
                    prompt[s] = slot + 1 - whole.SequenceStarts[s];
        }

        int[] lengths = Lengths(whole);
        Assert.That(lengths.Distinct().Count(), Is.EqualTo(sequences), "different lengths");
        var steps = new List<int[]> { prompt, (int[])[3, .. new int[sequences - 1]] };
        for (int i = 0; i < lengths.Max(); i++) steps.Add([.. Enumerable.Repeat(1, sequences)]);
        AssertSteps(model, whole, expected, steps, 1e-5);
    }

    // Steps bring so many tokens of each sequence, less where it ends. In the second round the
    // cache is cleared, and a warm step allocates nothing.
    private static void AssertSteps(LoadedModel model, Batch whole, float[] expected,
        IReadOnlyList<int[]> steps, double tolerance)
    {
        int[] lengths = Lengths(whole);
        int vocabulary = model.Spec.Decoder.VocabSize;
        double magnitude = expected.Max(Math.Abs), worst = 0;
        var cache = new KeyValueCache(
            model.Device, model.Spec.Decoder, lengths.Length, lengths.Max());
        // Emulated GPUs are slow, and allocate.
        int rounds = model.Device is CpuDevice ? 2 : 1;
        long least = long.MaxValue;
        for (int round = 0; round < rounds; round++)
        {
            cache.Clear();
            var done = new int[lengths.Length];
            foreach (int[] step in steps)
            {
                int[] next = [.. done.Select((n, s) => Math.Min(n + step[s], lengths[s]))];
                Batch part = Part(whole, done, next);
                long before = GC.GetAllocatedBytesForCurrentThread();
                Tensor logits =
                    model.Model.Logits(model.Graph, model.Hidden(part, cache: cache));
                long allocated = GC.GetAllocatedBytesForCurrentThread() - before;
                float[] got = model.Device.ReadFloats(logits);
                model.Graph.EndStep();
                Assert.That(cache.Lengths.ToArray(), Is.EqualTo(next));
                for (int s = 0, row = 0; s < lengths.Length; s++)
                    for (int i = done[s]; i < next[s]; i++, row++)
                        for (int v = 0; v < vocabulary; v++)
                            worst = Math.Max(worst, Math.Abs(
                                expected[((whole.SequenceStarts[s] + i) * vocabulary) + v]
                                - got[(row * vocabulary) + v]));
                if (round > 0) least = Math.Min(least, allocated);
                done = next;
                if (done.SequenceEqual(lengths)) break;
            }
        }

        TestContext.Out.WriteLine($"worst error {worst / magnitude:E2} of {magnitude:G4}");
        Assert.That(worst / magnitude, Is.LessThan(tolerance));
        if (rounds == 2) Assert.That(least, Is.Zero);
    }

    private static LoadedModel Open(ModelSpec spec, DType storage, DeviceSource? devices = null)
    {
        using var weights = Checkpoint.Open(spec.Directory);
        OpenDevice device = (devices ?? DeviceSource.Default).Open(V26.Full with
        {
            Device = devices is null ? DeviceChoice.Cpu : DeviceChoice.Cuda,
            Bf16 = storage == DType.BF16,
        });
        return LoadedModel.Load(device, spec, weights, storage);
    }

    private static float[] Logits(LoadedModel model, Batch batch)
    {
        float[] logits = model.Device.ReadFloats(
            model.Model.Logits(model.Graph, model.Hidden(batch)));
        model.Graph.EndStep();
        return logits;
    }

    private static int[] Lengths(Batch whole) =>
        [.. Enumerable.Range(0, whole.SequenceStarts.Count - 1)
            .Select(s => whole.SequenceStarts[s + 1] - whole.SequenceStarts[s])];

    // Tokens from..to of each sequence; the pictures come with the first.
    private static Batch Part(Batch whole, int[] from, int[] to)
    {
        var part = new Batch();
        part.Clear();
        int slots = 0;
        for (int s = 0; s < from.Length; s++)
        {
            int start = whole.SequenceStarts[s];
            for (int i = start + from[s]; i < start + to[s]; i++)
            {
                if (whole.Slots.Span.Contains(i))
                {
                    part.Slots.Add(part.Tokens.Count);
                    slots++;
                }

                part.Tokens.Add(whole.Tokens[i]);
                part.Positions.Add(whole.Positions[i]);
            }

            part.SequenceStarts.Add(part.Tokens.Count);
        }

        if (slots == 0) return part;
        Assert.That(slots, Is.EqualTo(whole.Slots.Count), "pictures are never split");
        part.Patches.Add(whole.Patches.Span);
        part.Grids.Add(whole.Grids.Span);
        part.SlotFeatures.Add(whole.SlotFeatures.Span);
        part.PictureStarts.Clear();
        part.PictureStarts.Add(whole.PictureStarts.Span);
        return part;
    }
}
