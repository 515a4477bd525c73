using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What answers take of a GPU and how little a step of one does, counted at MiniCPM-V-2_6's real
/// size on a device that only counts.
/// </summary>
[TestFixture, NonParallelizable]
public sealed class AskedMemoryTests
{
    private const int Tokens = 8192, Answer = 2048, Views = 10, KeyCols = 512, Layers = 28;

    private static readonly int[] s_ids = [.. Enumerable.Range(0, Tokens)];
    private string _folder = "";

    [OneTimeSetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [OneTimeTearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // The longest conversation that is asked, with a picture of ten views in it.
    [TestCase(false, 1)]
    [TestCase(true, 1)]
    [TestCase(false, 4)]
    public void AChatTakesWeightsAndCacheAndFivePercent(bool adapted, int sequences)
    {
        using CountedModel real = V26Counted(_folder, adapted);
        long weights = real.Held;
        var generator = new Generator(real.Model, real.Counter);
        generator.Reserve(sequences, Tokens + Answer);
        GeneratedTokens[] answers = generator.Run(
            [.. Enumerable.Range(0, sequences).Select(_ => Prompt())],
            new GenerationSettings { MaxNewTokens = 3 });
        Assert.That(answers.Select(answer => answer.Ids.Length), Is.All.EqualTo(3));
        long cache = 2L * 2 * Layers * KeyCols * sequences * (Tokens + Answer);
        double share = (double)real.Held / (weights + cache);
        TestContext.Out.WriteLine($"{weights:N0} + {cache:N0}, steps "
            + $"{real.Device.Step.Reserved:N0}, held {real.Held:N0}: {share:0.000}");
        if (!adapted) Assert.That(weights, Is.InRange(16_000_000_000, 16_500_000_000));
        Assert.That(share, Is.InRange(1, 1.05));
    }

    [Test]
    public void StepsTakeWhatTheLargestOfThemNeeds()
    {
        using CountedModel real = V26Counted(_folder, adapted: false);
        var generator = new Generator(real.Model, real.Counter);
        generator.Reserve(3, 600);
        long none = real.Held;
        Assert.That(real.Device.Step.Reserved, Is.Zero);
        Run(20);
        long small = real.Device.Step.Reserved;
        Run(500);
        long large = real.Device.Step.Reserved;
        Run(20);
        Assert.That(real.Device.Step.Reserved, Is.EqualTo(large));
        Assert.That(small, Is.Positive.And.LessThan(large / 4));
        Assert.That(real.Device.Step.Needed, Is.EqualTo(large), "all of it was used");
        Assert.That(real.Held - none, Is.LessThan(large + (16 << 20)));

        void Run(int tokens) => generator.Run(
            [new GenerationInput(tokens, batch => batch.AddRow(s_ids.AsSpan(0, tokens), []))],
            new GenerationSettings { MaxNewTokens = 4 });
    }

    // Frozen weights are read once, adapters too; beside them and the cache next to nothing moves,
    // in few launches.
    [TestCase(false, 1, 16)]
    [TestCase(false, 16, 16)]
    [TestCase(true, 1, 30)]
    public void AStepReadsItsWeightsOnce(bool adapted, int sequences, int launchesOfALayer)
    {
        using CountedModel real = V26Counted(_folder, adapted);
        var generator = new Generator(real.Model, real.Counter);
        var watch = new Steps();
        int told = 0;
        real.Device.Watch = watch;
        generator.Run(
            [.. Enumerable.Range(0, sequences).Select(_ =>
                new GenerationInput(8, batch => batch.AddRow(s_ids.AsSpan(0, 8), [])))],
            new GenerationSettings { MaxNewTokens = 3 },
            said: (_, _) => ++told > 2 * sequences || watch.Restart());
        long decoder = real.Model.Spec.Parameters.All.Where(p =>
            p.Name.StartsWith("llm.", StringComparison.Ordinal) && p.Shape.Rank == 2
            && !p.Name.Contains("embed_tokens", StringComparison.Ordinal)).Sum(p =>
                2 * p.Shape.Count);
        long adapters = real.Trained;
        foreach (string line in watch.Lines) TestContext.Out.WriteLine(line);
        TestContext.Out.WriteLine($"{decoder:N0} + {adapters:N0} bytes of weights, products "
            + $"{watch.Products:N0}, the rest {watch.Rest:N0} in {watch.Launches} launches");
        // Products also have their inputs and results, the most of them the logits.
        Assert.That(watch.Products, Is.InRange(decoder, 1.01 * (decoder + adapters)));
        Assert.That(watch.Rest, Is.LessThan(0.01 * decoder));
        Assert.That(watch.Launches, Is.LessThan((launchesOfALayer * Layers) + 16));
    }

    private static GenerationInput Prompt()
    {
        ImageBound[] bounds =
            [.. Enumerable.Range(0, Views).Select(i => new ImageBound(i * 64, (i + 1) * 64))];
        Batch picture = RealModel.Row(Views * 64, Views);
        return new GenerationInput(Tokens, batch => Append(batch, 0, Tokens))
        {
            Ids = s_ids,
            Pictures = [new ImageBound(0, Views * 64)],
            AppendPart = Append,
        };

        void Append(Batch batch, int from, int to)
        {
            batch.AddRow(s_ids.AsSpan(0, to), bounds, from);
            if (from > 0) return;
            batch.Grids.Add(picture.Grids.Span);
            batch.Patches.Add(picture.Patches.Span);
            batch.PictureStarts.Clear();
            batch.PictureStarts.Add(picture.PictureStarts.Span);
        }
    }

    // V-2_6, with adapters on all layers of its decoder or without.
    private static CountedModel V26Counted(string folder, bool adapted)
    {
        TrainArguments arguments = RealModel.Lora with
        {
            LoraTargetModules = new TargetModules(
                @"llm\..*layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"),
        };
        PlannedModel planned = RealModel.Planned(folder, arguments);
        return new CountedModel(planned.Spec, adapted ? planned.Parts : null);
    }

    // What the last step queued.
    private sealed class Steps : ILaunchWatch
    {
        private readonly Dictionary<string, (int Count, long Bytes)> _work = [];
        private bool _cached;

        public IEnumerable<string> Lines =>
            _work.Select(w => $"{w.Key}: {w.Value.Count}, {w.Value.Bytes:N0} bytes");

        public long Products { get; private set; }

        public long Rest { get; private set; }

        public int Launches { get; private set; }

        public bool Restart()
        {
            (Products, Rest, Launches) = (0, 0, 0);
            _work.Clear();
            return true;
        }

        // What reads or writes the cache counts all the room there is.
        public void Operation(Op op, in OpCall call, bool backward) =>
            _cached = op.Name is "attention" or "cache_append";

        public void Begin(in QueuedWork work)
        {
            Launches++;
            string name = work.Name.Split(' ')[0];
            var (count, bytes) = _work.GetValueOrDefault(name);
            _work[name] = (count + 1, bytes + work.Bytes);
            if (work.Flops > 0) Products += work.Bytes;
            else if (!_cached) Rest += work.Bytes;
        }

        public void End()
        {
        }
    }
}
