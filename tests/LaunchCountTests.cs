using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// How many kernels, products, fills and copies a training step of MiniCPM-V-2_6's decoder queues,
/// counted at its real sizes on a driver that does nothing: each costs a GPU some microseconds.
/// </summary>
[TestFixture, NonParallelizable]
public sealed class LaunchCountTests
{
    private const int Tokens = 2048, Labels = 1024, Layers = 28;

    private static readonly DecoderSpec s_spec = new(
        151_666, 3584, 18944, 1, 28, 4, 128, 1e-6f, QkvBias: true, TiedHead: false, 1e6,
        RopeScaling.None, 32768);

    [TestCase("q_proj k_proj v_proj", 1500)]
    [TestCase("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", 2200)]
    public void AStepQueuesFew(string adapters, int most)
    {
        Dictionary<string, int> one = Count(adapters, layers: 1), two = Count(adapters, layers: 2);
        int Step(string call) => one.GetValueOrDefault(call)
            + ((Layers - 1) * (two.GetValueOrDefault(call) - one.GetValueOrDefault(call)));
        int all = two.Keys.Sum(Step), layer = two.Values.Sum() - one.Values.Sum();
        TestContext.Out.WriteLine($"a layer {layer}, a step {all}");
        foreach (string call in two.Keys.Order())
            TestContext.Out.WriteLine(
                $"{call} {two[call] - one.GetValueOrDefault(call)} a layer, {Step(call)} a step");
        Assert.That(all, Is.LessThan(most));
    }

    private static Dictionary<string, int> Count(string adapters, int layers)
    {
        using CudaContext context = CountingCuda.Context(new("counted", 132, 80, 80L << 30));
        using CudaDevice device = CountingCuda.Device(context, DType.BF16);
        var graph = new Graph(device);
        DecoderSpec spec = s_spec with { Layers = layers };
        var source = new Source(graph, adapters.Split());
        var decoder = new Decoder(
            spec, new ModuleScope(new ParameterTable.Builder(), source), Recomputation.None);
        var inputs = new DecoderContext
        {
            Positions = Ints(Tokens),
            Starts = Ints(2),
        };
        inputs.Reach(spec, Tokens, new BatchUpload(device));
        Tensor ids = Ints(Tokens), rows = Ints(Labels), targets = Ints(Labels);
        device.Random = new(1, 1, Dropout: true);
        var calls = new Dictionary<string, int>();
        device.Watch = new Counter(calls);
        Tensor x = decoder.Embed(graph, ids);
        graph.Backward(decoder.Loss(
            graph, decoder.Forward(graph, x, inputs, null), rows, targets, []), 1);
        graph.EndStep();

        TestContext.Out.WriteLine($"{layers} layers: {graph.PeakBytes >> 20} MiB");
        return calls;

        Tensor Ints(int count) => device.Allocate(new(DType.I32, new Shape(count)), "ints");
    }

    private sealed class Counter(Dictionary<string, int> calls) : ILaunchWatch
    {
        public void Operation(Op op, in OpCall call, bool backward)
        {
        }

        public void Begin(in QueuedWork work)
        {
            string name = work.Name.Split(' ')[0];
            calls[name] = calls.GetValueOrDefault(name) + 1;
        }

        public void End()
        {
        }
    }

    // Frozen weights, and adapters of rank 64 on the layers of these names.
    private sealed class Source(Graph graph, string[] adapters) : ITensorSource
    {
        private Tensor _together;
        private int _index, _used;

        public Tensor Vector(string name, int begin, int count) => New(DType.F32, count);

        public Tensor Small(string name) => Tensor.None;

        public Tensor Matrix(string name, int begin, int rows, int cols) =>
            New(DType.BF16, rows, cols);

        public Tensor Table(string name, bool isLookedUp) =>
            New(DType.BF16, s_spec.VocabSize, s_spec.HiddenSize);

        public Tensor Original(string name) => Tensor.None;

        public StreamedBlock? BeginBlock(ModelPart part) => null;

        public bool IsPacked(string weight) => true;

        public void Together(string first, int rows, int cols)
        {
            _together = New(DType.BF16, rows, cols);
            _used = 0;
        }

        public Projection Projection(
            string module, string weight, int begin, int rows, Tensor bias)
        {
            const int Rank = 64;
            int cols = weight.Contains("down_proj", StringComparison.Ordinal)
                ? s_spec.IntermediateSize : s_spec.HiddenSize;
            bool one = _together.Exists && _used + rows <= _together.Shape[0];
            var matrix = new DenseWeight(
                one ? _together.Slice(_used, rows) : New(DType.BF16, rows, cols));
            if (one) _used += rows;
            if (!adapters.Contains(module[(module.LastIndexOf('.') + 1)..]))
                return new Projection(matrix, bias);
            return new Projection(
                matrix, bias, new Adapter(module, _index++, Rank, 1, cols, rows), 0.05,
                Trained(Rank, cols), Trained(rows, Rank));
        }

        private Tensor Trained(int rows, int cols) =>
            graph.Parameter(New(DType.BF16, rows, cols), New(DType.F32, rows, cols));

        private Tensor New(DType type, params int[] sizes) =>
            graph.Device.Allocate(new(type, new Shape(sizes)), "test");
    }
}
