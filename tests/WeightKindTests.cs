using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The reference model with all its frozen projections of another kind than dense: LoRA trains on
/// it as it does on the dense model of the same numbers, and neither the model nor an operation
/// knows.
/// </summary>
[TestFixture]
public sealed class WeightKindTests
{
    // Seven projections of each decoder layer, six of each vision layer, and the resampler's
    // kv_proj, query, key, value and out_proj.
    private static readonly int s_projections =
        (7 * V26.Spec.Decoder.Layers) + (6 * V26.Spec.Vision.Layers) + 5;

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase(false)]
    [TestCase(true)]
    public void LoraTrainsOnItAsOnTheDenseWeightsOfItsNumbers(bool checkpointed)
    {
        TrainArguments arguments =
            V26.Lora with { GradientCheckpointing = checkpointed, LoraDropout = 0.1 };
        var kind = new Int8Kind();
        using TunedModel other = Open(arguments, kind);
        Assert.That(kind.Weights, Has.Count.EqualTo(s_projections));
        using TunedModel dense = Open(arguments with { ModelNameOrPath = Dense(kind) });
        Assert.That(((CpuDevice)other.Device).AllocatedBytes,
            Is.LessThan(((CpuDevice)dense.Device).AllocatedBytes));
        Assert.That(kind.Weights.Sum(w => w.Bytes),
            Is.LessThan(0.6 * kind.Weights.Sum(w => 2L * w.Outputs * w.Inputs)));

        Batch batch = V26.Batch(arguments, "one", "text1");
        Trainer ours = new(arguments, other), theirs = new(arguments, dense);
        double first = 0, last = 0;
        for (int step = 0; step < 4; step++)
        {
            last = ours.Step(step, [batch], 1e-2).Loss;
            double loss = theirs.Step(step, [batch], 1e-2).Loss;
            if (step == 0) first = last;
            Assert.That(last, Is.EqualTo(loss).Within(1e-6 * loss), $"step {step}");
            foreach (TunedTensor tensor in other.ParameterRanges.List)
            {
                AssertEqual(other, dense, tensor.Name, (m, n) => m.ParameterRanges.Gradient(n));
                AssertEqual(other, dense, tensor.Name, (m, n) => m.ParameterRanges.Value(n));
            }
        }

        Assert.That(last, Is.LessThan(0.9 * first));
    }

    [TestCase(false)]
    [TestCase(true)]
    public void AWarmStepAllocatesNothing(bool checkpointed)
    {
        TrainArguments arguments = V26.Lora with { GradientCheckpointing = checkpointed };
        var kind = new Int8Kind();
        using TunedModel model = Open(arguments, kind);
        var trainer = new Trainer(arguments, model);
        Batch batch = V26.Batch(arguments, "one");
        trainer.Step(0, [batch], 1e-5);
        long before = GC.GetAllocatedBytesForCurrentThread();
        trainer.Step(1, [batch], 1e-5);
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
        foreach (var (name, weight) in kind.Names.Zip(kind.Weights))
            Assert.That(weight.Products, Is.GreaterThanOrEqualTo(2), name);
    }

    [Test]
    public void OnCudaItHasTheGradientsOfTheCpu()
    {
        TrainArguments arguments = V26.Lora;
        Batch batch = V26.Batch(arguments, "text1");
        var kind = new Int8Kind();
        using TunedModel expected = Open(arguments, kind);
        double loss = V26.Gradients(expected, arguments, batch).Loss;
        using var cuda = new CudaUnderTest(source: Int8Weight.Source, keep: true);
        using BaseModel source = BaseModel.Open(arguments);
        var there = new Int8Kind();
        using var model = TunedModel.Load(
            source, new OpenDevice(cuda.Device(DType.F32), "GPU"), arguments, kind: there);
        CopyAdapter(model);
        Assert.That(V26.Gradients(model, arguments, batch).Loss,
            Is.EqualTo(loss).Within(1e-5 * loss));
        Assert.That(there.Weights, Has.Count.EqualTo(s_projections));
        foreach (TunedTensor tensor in model.ParameterRanges.List)
            AssertEqual(
                model, expected, tensor.Name, (m, n) => m.ParameterRanges.Gradient(n), 1e-4);
    }

    private static void AssertEqual(TunedModel got, TunedModel expected, string name,
        Func<TunedModel, string, Tensor> of, double tolerance = 1e-6)
    {
        double[] wanted =
            Array.ConvertAll(expected.Device.ReadFloats(of(expected, name)), v => (double)v);
        Assert.That(wanted, Has.Some.Not.Zero, name);
        Assert.That(V26.NormError(got.Device.ReadFloats(of(got, name)), wanted),
            Is.LessThan(tolerance), name);
    }

    private static TunedModel Open(TrainArguments arguments, IWeightKind? kind = null)
    {
        var model = TunedModel.Open(arguments, kind: kind);
        CopyAdapter(model);
        return model;
    }

    // A fresh adapter's B is zero, and so the gradient of its A.
    private static void CopyAdapter(TunedModel model)
    {
        using var adapter = AdapterFile.Open(V26.Adapter("random_lora_only"));
        model.CopyFrom(adapter);
    }

    // The reference with the numbers that the weights stand for; bf16 holds them exactly.
    private string Dense(Int8Kind kind)
    {
        foreach (string file in Directory.GetFiles(V26.Model, "*.json"))
            File.Copy(file, Path.Combine(_folder, Path.GetFileName(file)));
        using var original = Checkpoint.Open(V26.Model);
        MadeModel.Write(_folder, V26.Spec, name =>
        {
            float[] values = original.Get(name).ToFloats();
            foreach (var (begin, weight) in kind.Of(name))
                Array.ConvertAll(weight.Dequantised, v => (float)v)
                    .CopyTo(values, begin * weight.Inputs);
            return values;
        }, DType.BF16);
        return _folder;
    }

    /// <summary>Makes int8 weights of all matrices, and knows which.</summary>
    private sealed class Int8Kind : IWeightKind
    {
        private readonly List<(string Name, int Begin, Int8Weight Weight)> _made = [];

        public IReadOnlyList<Int8Weight> Weights => [.. _made.Select(m => m.Weight)];

        public IReadOnlyList<string> Names => [.. _made.Select(m => m.Name)];

        public IEnumerable<(int Begin, Int8Weight Weight)> Of(string name) =>
            _made.Where(m => m.Name == name).Select(m => (m.Begin, m.Weight));

        public Weight? Load(Device device, StoredTensor matrix, int begin, int rows)
        {
            int cols = matrix.Shape.Cols;
            var weight = Int8Weight.Nearest(
                device, cols, matrix.ToFloats().AsSpan(begin * cols, rows * cols));
            _made.Add((matrix.Name, begin, weight));
            return weight;
        }
    }
}
