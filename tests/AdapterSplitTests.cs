using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Adapters that start as a part of their weights (PiSSA, OLoRA): the factors against independent
/// ones in float64, runs and files against PEFT (tests/reference/adapters).
/// </summary>
[TestFixture]
public sealed unsafe class AdapterSplitTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void LargestSingularValuesAreThoseOfTheWholeDecomposition()
    {
        ReferenceFile file = ReferenceFile.OpenCommitted("adapters/pissa_olora");
        var ratios = new List<double>();
        foreach (JsonElement each in file.Index.GetProperty("cases").EnumerateArray())
        {
            string name = each.GetProperty("name").GetString()!;
            JsonElement known = each.GetProperty("params");
            if (known.GetProperty("kind").GetString() != "pissa") continue;
            float[] w = [.. file.Doubles(name + "/w").Select(v => (float)v)];
            int rows = file.Shape(name + "/w")[0], rank = known.GetProperty("rank").GetInt32();
            double[] product = file.Doubles(name + "/product");
            Assert.That(Error(w, rows, rank, null, 0, product), Is.LessThan(2e-6), name);
            if (!known.TryGetProperty("niter_error", out var steps)) continue;
            foreach (var kind in steps.EnumerateObject())
            {
                // The largest error of twenty draws, against that of torch.svd_lowrank's.
                double largest = Enumerable.Range(0, 20).Max(seed => Error(w, rows, rank,
                    LoraStart.Parse(kind.Name)!.Iterations, (ulong)seed, product));
                ratios.Add(largest / kind.Value[0].GetDouble());
                Assert.That(ratios[^1], Is.LessThan(2), $"{name} {kind.Name}");
            }
        }

        TestContext.Out.WriteLine($"{ratios.Average():0.00} on average");
        Assert.That(ratios.Average(), Is.LessThan(1.15));
    }

    // Values of which the 40 largest fall slowly and the rest is near them, in a matrix that is
    // too large to be decomposed whole.
    [TestCase(330, 500, 1)]
    [TestCase(500, 330, 1)]
    [TestCase(330, 500, 100)]
    public void ManyCloseValuesAreFound(int rows, int cols, double first)
    {
        const int rank = 40, all = 300;
        double[] left = Drawn(all, rows, 1), right = Drawn(all, cols, 2);
        Factorisation.Lq(left, all, rows);
        Factorisation.Lq(right, all, cols);
        double[] wanted = new double[rows * cols], w = new double[rows * cols];
        for (int k = 0; k < all; k++)
        {
            double value = k < 4 ? 10 * first
                : k < rank ? 10 - (0.1 * k) : 5.5 * Math.Pow(0.995, k - rank);
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < cols; j++)
                {
                    double part = value * left[(k * rows) + i] * right[(k * cols) + j];
                    w[(i * cols) + j] += part;
                    if (k < rank) wanted[(i * cols) + j] += part;
                }
        }

        float[] single = [.. w.Select(v => (float)v)];
        Assert.That(Error(single, rows, rank, null, 3, wanted), Is.LessThan(1e-5));
    }

    [TestCase("pissa")]
    [TestCase("pissa_rslora")]
    [TestCase("pissa_patterns")]
    [TestCase("olora")]
    public void RunsAndFilesAreThoseOfPeft(string name)
    {
        JsonElement expected = ReferenceText.Json("adapters/cases.json").GetProperty(name);
        TrainArguments arguments = TenSteps(name);
        var said = new List<string>();
        using var model = TunedModel.Open(arguments, say: said.Add);
        Assert.That(said, Has.Some.StartsWith(
            $"init_lora_weights={arguments.InitLoraWeights.Text}: taking the start of 4 adapters"));
        var before = model.Parts.Adapters.List.ToDictionary(
            a => a.Module, a => Product(model, a));
        using (var weights = Checkpoint.Open(V26.Model))
            foreach (var (module, product) in before)
            {
                AssertClose(product, expected.GetProperty("start_products").GetProperty(module));
                float[] rest = weights.Get(module + ".weight").ToFloats();
                for (int i = 0; i < rest.Length; i++) rest[i] -= product[i];
                AssertClose(rest,
                    expected.GetProperty("residual").GetProperty(module + ".weight"));
            }

        AdapterVariantTests.AssertSteps(model, arguments, expected);
        foreach (Adapter adapter in model.Parts.Adapters.List)
            AssertClose([.. Product(model, adapter).Zip(before[adapter.Module], (a, b) => a - b)],
                expected.GetProperty("change").GetProperty(adapter.Module));

        string saved = Directory.CreateDirectory(Path.Combine(_folder, "saved")).FullName;
        ModelFiles.Save(saved, model, arguments);
        JsonNode config = JsonNode.Parse(
            File.ReadAllText(Path.Combine(saved, AdapterConfig.FileName)))!;
        JsonNode theirs = JsonNode.Parse(File.ReadAllText(Path.Combine(
            ReferenceFile.Root, "adapters", "as_lora", name + ".json")))!;
        foreach (var (key, value) in theirs.AsObject())
            if (key is not ("auto_mapping" or "base_model_name_or_path"))
                Assert.That(JsonNode.DeepEquals(config[key], value), Is.True,
                    $"{key}: {config[key]?.ToJsonString()}, expected {value?.ToJsonString()}");
        using (var file = SafetensorsFile.Open(Path.Combine(saved, AdapterFile.WeightsName)))
            Assert.That(file.Tensors.Select(t => $"{t.Name} {t.SizesText}"),
                Is.EquivalentTo(expected.GetProperty("as_lora").GetProperty("file")
                    .EnumerateObject().Select(t =>
                        $"{t.Name} [{string.Join(", ", ReferenceText.Ints(t.Value[1]))}]")));
        // On the untouched model it is what was trained.
        using var reread = TunedModel.Open(AdapterSettings.Complete(
            V26.Lora with { LoraWeightPath = saved }, key => key == "modules_to_save"));
        Trace trace = Trace.Run(reread, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"],
            expected.GetProperty("case_a_after").GetProperty("logits"), 1e-4);
    }

    [TestCase("pissa_niter_2", false)]
    [TestCase("olora", true)]
    public void RunsGoOnWithTheSameBits(string start, bool rounded)
    {
        TrainArguments arguments = TenSteps("pissa_patterns") with
        {
            InitLoraWeights = LoraStart.Parse(start)!,
            DataPath = Runs.Data(_folder, "one", "turns"),
            OutputDir = Path.Combine(_folder, "out"),
            Bf16 = rounded,
            LoraDropout = 0.1,
            MaxSteps = 4,
            SaveSteps = new Interval(2),
        };
        Runs.Train(arguments);
        TrainArguments resumed = arguments with
        {
            OutputDir = Path.Combine(_folder, "resumed"),
            ResumeFromCheckpoint = new ResumePoint(RunFolder.Checkpoint(arguments.OutputDir, 2)),
        };
        // Read back, not found again.
        Assert.That(Runs.Train(resumed), Does.Not.Contain("init_lora_weights="));
        foreach (string file in (string[])[AdapterFile.WeightsName, RunState.OptimizerFile])
            Assert.That(
                File.ReadAllBytes(Path.Combine(RunFolder.Checkpoint(resumed.OutputDir, 4), file)),
                Is.EqualTo(File.ReadAllBytes(
                    Path.Combine(RunFolder.Checkpoint(arguments.OutputDir, 4), file))), file);
    }

    [TestCase("--init_lora_weights pissa --use_dora", "whole weights; leave use_dora out")]
    [TestCase("--init_lora_weights pissa_niter_4 --q_lora", "init_lora_weights=pissa_niter_4 "
        + "takes")]
    [TestCase("--init_lora_weights pissa_niter_x", "is \"pissa_niter_x\", expected true, ")]
    public void WhatCannotGoTogetherIsNamed(string given, string expected) =>
        Assert.That(() => TrainReader.Read(
            ["--use_lora", "--tune_llm", "false", "--model_name_or_path", V26.Model,
                "--data_path", V26.Rows, .. given.Split(' ')], _folder),
            Throws.TypeOf<InputException>().With.Message.Contains(expected)
                .And.Message.Not.Contains("\n"));

    [Test]
    public void ARankAboveTheWeightsIsNamed() => Assert.That(
        () => TunedModel.Open(TenSteps("pissa") with { LoraR = 200 }).Dispose(),
        SafetensorsTests.Refuses("v_proj [128, 256] has no 200 directions to start from"));

    private static TrainArguments TenSteps(string name)
    {
        TrainArguments plain = AdapterVariantTests.TenSteps(name) with
        {
            InitLoraWeights = LoraStart.Parse(name == "olora" ? "olora" : "pissa")!,
            LoraTargetModules = new TargetModules(@"llm\..*self_attn\.(q_proj|v_proj)"),
        };
        return name switch
        {
            "pissa_rslora" => plain with { UseRslora = true, LoraAlpha = 8 },
            "pissa_patterns" => plain with
            {
                RankPattern = new NumbersByName([("v_proj", 4)]),
                AlphaPattern = new NumbersByName([("q_proj", 32)]),
            },
            _ => plain,
        };
    }

    // Norm of the difference of U diag(s) Vt and what it should be, as part of the latter's.
    private static double Error(
        float[] w, int rows, int rank, int? steps, ulong seed, double[] product)
    {
        int cols = w.Length / rows;
        using var workers = new Workers(1);
        using var gemm = new Gemm(workers);
        fixed (float* data = w)
        {
            var (ut, s, vt) = TruncatedSvd.Of(
                gemm, new MatrixView(data, DType.F32, rows, cols), rank, steps, seed);
            var got = new double[w.Length];
            for (int k = 0; k < rank; k++)
                for (int i = 0; i < rows; i++)
                    for (int j = 0; j < cols; j++)
                        got[(i * cols) + j] += s[k] * ut[(k * rows) + i] * vt[(k * cols) + j];
            // The reference's product is B A times its scale, which is the same.
            return steps is null
                ? Math.Sqrt(got.Zip(product, (a, b) => (a - b) * (a - b)).Sum()
                    / product.Sum(v => v * v))
                : got.Zip(product, (a, b) => Math.Abs(a - b)).Max() / product.Max(Math.Abs);
        }
    }

    private static double[] Drawn(int count, int size, int seed)
    {
        var random = new Random(seed);
        return [.. Enumerable.Range(0, count * size).Select(_ => random.NextDouble() - 0.5)];
    }

    private static float[] Product(TunedModel model, Adapter adapter)
    {
        float[] a = model.Device.ReadFloats(
            model.ParameterRanges.Value(Adapters.NameOfA(adapter.Module)));
        float[] b = model.Device.ReadFloats(
            model.ParameterRanges.Value(Adapters.NameOfB(adapter.Module)));
        var product = new float[adapter.Outputs * adapter.Inputs];
        for (int i = 0; i < adapter.Outputs; i++)
            for (int j = 0; j < adapter.Inputs; j++)
            {
                double sum = 0;
                for (int k = 0; k < adapter.Rank; k++)
                    sum += (double)b[(i * adapter.Rank) + k] * a[(k * adapter.Inputs) + j];
                product[(i * adapter.Inputs) + j] = (float)(adapter.Scale * sum);
            }

        return product;
    }

    private static void AssertClose(float[] got, JsonElement expected)
    {
        var wanted = Fingerprint.Read(expected);
        double error = Fingerprint.Of(got, wanted.Shape).NormError(wanted);
        TestContext.Out.WriteLine($"{error:E2} of the norm");
        Assert.That(error, Is.LessThan(1e-4));
    }
}
