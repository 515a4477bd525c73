using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Over a cache the pictures of a prompt run a few at a time, its sounds clip by clip: with the
/// bits of all at once.
/// </summary>
[TestFixture]
public sealed class PicturePartsTests
{
    // l3 pads all pictures to the largest one of the row.
    [TestCase("v26")]
    [TestCase("l3")]
    [TestCase("v2")]
    [TestCase("v46")]
    public void PicturesHaveTheBitsOfAllAtOnce(string family)
    {
        using AskedModel model = GenerationCase.Open(family == "v46" ? V46.Model
            : Path.Combine(ReferenceFile.Root, family, "model"));
        var (much, little) = AssertSame(model, model.Rows, "p7.png", "p3.png", "p1.png");
        Assert.That(little, Is.LessThan(0.8 * much));
    }

    [Test]
    public void OnCudaToo()
    {
        using var cuda = new CudaSource();
        using AskedModel model = AskedModel.Open(new TrainArguments
        {
            ModelNameOrPath = Path.Combine(ReferenceFile.Root, "v26", "model"),
            Device = DeviceChoice.Cuda,
        }, null, cuda.Source);
        AssertSame(model, model.Rows with
        {
            Slicing = model.Rows.Slicing with { ScaleResolution = 56 },
        }, "p0.png", "p1.png");
    }

    // Clips of different lengths, which the encoder fills up to the longest of the row.
    [Test]
    public void ClipsAreHeardOneByOneAsAllAtOnce()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        try
        {
            AudioModel.Write(folder);
            using AskedModel model = AskedModel.Open(new TrainArguments
            {
                ModelNameOrPath = folder,
                Device = DeviceChoice.Cpu,
                InitAudio = true,
            }, null);
            var maker = new PromptMaker(model.Model.Spec, model.Rows);
            float[][] sounds = [.. ((int[])[16000, 70000, 9000]).Select((samples, i) =>
                maker.Hear(AudioModel.Wav(samples, i), "sound"))];
            GenerationInput input = maker.Make(
                [new("user", [new(null, -1, 0), new(null, -1, 1), "Which?", new(null, -1, 2)])],
                [], sounds: sounds);
            float[] expected = GenerationCase.Logits(model, input);
            double error = V26.LargestError(
                Logits(model, input, out _), Array.ConvertAll(expected, v => (double)v));
            Assert.That(error, Is.LessThan(1e-5));
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    // Frames of a group become features together, and stay together.
    [Test]
    public void PartsAreWholeGroupsOfViews()
    {
        var batch = new Batch();
        batch.Clear();
        int[] patches = [4, 6, 2, 2, 8, 1, 1];
        foreach (int count in patches)
        {
            batch.Grids.Add([1, count]);
            batch.PictureStarts.Add(batch.PictureStarts[batch.PictureStarts.Count - 1] + count);
            batch.Patches.Extend(2 * count).Fill(count);
        }

        foreach (bool joined in (bool[])[false, false, true, true, false])
            batch.Times.Add(new ViewTime(7, joined));
        Assert.That(Parts(1), Is.EqualTo((string[])["4", "6 2 2", "8", "1", "1"]));
        Assert.That(Parts(10), Is.EqualTo((string[])["4", "6 2 2", "8 1 1"]));
        Assert.That(Parts(14), Is.EqualTo((string[])["4 6 2 2", "8 1 1"]));
        Assert.That(Parts(int.MaxValue), Is.EqualTo((string[])["4 6 2 2 8 1 1"]));

        IEnumerable<string> Parts(int most)
        {
            var part = new Batch();
            for (int view = 0; view < patches.Length;)
            {
                int first = view;
                view = part.TakeViews(batch, first, most);
                int[] own = patches[first..view];
                Assert.That(part.PictureStarts[part.PictureStarts.Count - 1],
                    Is.EqualTo(own.Sum()));
                Assert.That(part.Patches.Span.ToArray(), Is.EqualTo(
                    own.SelectMany(n => Enumerable.Repeat((float)n, 2 * n))));
                Assert.That(part.Times.Count, Is.EqualTo(Math.Clamp(5 - first, 0, own.Length)));
                Assert.That(part.LongestView, Is.EqualTo(8));
                yield return string.Join(' ', own);
            }
        }
    }

    // Bytes of steps with all pictures at once, and one by one.
    private static (long Much, long Little) AssertSame(
        AskedModel model, RowFormat rows, params string[] pictures)
    {
        var maker = new PromptMaker(model.Model.Spec, rows, 4);
        PromptPicture[] shown = [.. pictures.Select(name => maker.Open(
            Path.Combine(ReferenceFile.Root, "v26", "data", "images", name)))];
        GenerationInput input = maker.Make(
            [new("user", [.. shown.Select((_, i) => (PromptPart)i), "What is this?"])], shown);
        MiniCpmModel modules = model.Model.Model;
        modules.MostPatches = int.MaxValue;
        float[] whole = Logits(model, input, out long much);
        modules.MostPatches = 1;
        Assert.That(Logits(model, input, out long little), Is.EqualTo(whole));
        if (model.Model.Device is CpuDevice)
        {
            modules.MostPatches = 2 * MiniCpmModel.Piece;
            Assert.That(Logits(model, input, out _), Is.EqualTo(whole));
        }

        TestContext.Out.WriteLine($"{much:N0} and {little:N0} bytes");
        return (much, little);
    }

    private static float[] Logits(AskedModel model, GenerationInput input, out long bytes)
    {
        LoadedModel loaded = model.Model;
        loaded.Device.Step.ResetNeeded();
        var cached = new CachedModel(loaded, null);
        cached.Begin(1, input.Tokens);
        float[] logits = [.. cached.Append(0, input.Append)];
        bytes = loaded.Device.Step.Needed;
        return logits;
    }
}
