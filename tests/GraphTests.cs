using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>The tape, on a small residual network of LoRA layers with dropout.</summary>
[TestFixture]
public sealed class GraphTests
{
    private const int Tokens = 5, Cols = 8, Rank = 2, Vocabulary = 11;

    [Test]
    public void CheckpointingGivesTheSameBits()
    {
        using var plain = new Network(checkpoint: false);
        using var saving = new Network(checkpoint: true);
        foreach (int step in (int[])[0, 1])
        {
            double a = plain.Step(step), b = saving.Step(step);
            Assert.That(b, Is.EqualTo(a));
            Assert.That(saving.Gradients, Is.EqualTo(plain.Gradients));
            Assert.That(plain.Gradients, Has.Some.Not.Zero);
        }

        Assert.That(saving.Graph.Device.Step.Peak, Is.LessThan(plain.Graph.Device.Step.Peak));
    }

    [Test]
    public void DropoutDependsOnTheStepAlone()
    {
        using var network = new Network(checkpoint: false);
        double first = network.Step(0), second = network.Step(1);
        Assert.That(second, Is.Not.EqualTo(first));
        Assert.That(network.Step(0), Is.EqualTo(first));
    }

    [Test]
    public void GradientsEqualCentralDifferencesThroughTheWholeTape()
    {
        using var network = new Network(checkpoint: true, DType.F64);
        network.Step(3);
        double[] gradients = network.Gradients;
        const double Step = 1e-5;
        double worst = 0, largest = gradients.Max(Math.Abs);
        for (int i = 0; i < gradients.Length; i += 3)
        {
            double up = network.LossWith(i, Step, 3), down = network.LossWith(i, -Step, 3);
            worst = Math.Max(worst, Math.Abs(((up - down) / (2 * Step)) - gradients[i]) / largest);
        }

        Assert.That(worst, Is.LessThan(1e-6));
    }

    [Test]
    public void MicroBatchesAddUp()
    {
        using var network = new Network(checkpoint: false, DType.F64);
        network.Step(0);
        double[] first = network.Gradients;
        network.Step(1);
        double[] second = network.Gradients;
        network.Graph.ClearGradients();
        network.Step(0, clear: false);
        network.Step(1, clear: false, seed: 0.5);
        OpTests.AreClose(network.Gradients, [.. first.Zip(second, (a, b) => a + (b / 2))],
            1e-12 * first.Max(Math.Abs), "gradients");
    }

    [Test]
    public void AWarmStepAllocatesNothingAndLeavesTheArenaEmpty()
    {
        foreach (bool checkpoint in (bool[])[false, true])
        {
            using var network = new Network(checkpoint);
            for (int i = 0; i < 3; i++) network.Run(0, clear: true, seed: 1);
            long before = GC.GetAllocatedBytesForCurrentThread();
            network.Run(0, clear: true, seed: 1);
            Assert.That(
                GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero,
                $"checkpoint {checkpoint}");
            Assert.That(network.Graph.Device.Step.IsEmpty);
        }
    }

    [Test]
    public void FrozenPartsRecordNothing()
    {
        using var device = new CpuDevice(1, 1 << 20);
        var graph = new Graph(device);
        Tensor x = Some(device, 1, Tokens, Cols), w = Some(device, 2, Cols, Cols);
        Tensor b = Some(device, 3, Cols), db = Some(device, 4, Cols);
        b = graph.Parameter(b, db);
        Tensor frozen = graph.Run(new Linear(), x, w);
        Assert.That((graph.Length, frozen.Variable), Is.EqualTo((0, 0)));
        Tensor y = graph.Run(new Linear(), frozen, w, b);
        Assert.That(graph.Length, Is.EqualTo(1));
        graph.Recording = false;
        graph.Run(new Linear(), frozen, w, b);
        graph.Recording = true;
        Assert.That(graph.Length, Is.EqualTo(1));
        graph.Backward(y, 2);
        var got = new float[Cols];
        device.Read<float>(db, got);
        Assert.That(got, Is.All.EqualTo(2 * Tokens));
        Assert.That(graph.Length, Is.Zero);
        graph.EndStep();
        Assert.That(device.Step.IsEmpty);
    }

    [Test]
    public void KeepMovesATensorDownAndEndsTheOthers()
    {
        using var device = new CpuDevice(1, 1 << 20);
        var graph = new Graph(device);
        Tensor x = Some(device, 1, Tokens, Cols), w = Some(device, 2, Cols, Cols);
        ArenaMark mark = device.Step.Mark();
        Tensor first = graph.Run(new Linear(), x, w), second = graph.Run(new Linear(), first, w);
        var before = new float[Tokens * Cols];
        device.Read<float>(second, before);
        long used = device.Step.Used;
        Tensor kept = graph.Keep(mark, second);
        var after = new float[before.Length];
        device.Read<float>(kept, after);
        Assert.That(after, Is.EqualTo(before));
        Assert.That(device.Step.Used, Is.LessThan(used));
        Assert.That(() => graph.Run(new Linear(), second, w),
            Throws.TypeOf<StaleTensorException>().With.Message.Contain("kept").Or.Message.Contain(
                "linear"));
    }

    [Test]
    public void AReadAfterTheScopeEndedNamesTheTensor()
    {
        using var device = new CpuDevice(1, 1 << 20);
        var graph = new Graph(device);
        Tensor x = Some(device, 1, Tokens, Cols), w = Some(device, 2, Cols, Cols);
        Tensor y = graph.Run(new Linear(), x, w);
        graph.EndStep();
        Assert.That(() => graph.Run(new Linear(), y, w),
            Throws.TypeOf<StaleTensorException>().With.Message.Contain("F32[5, 8]"));
    }

    /// <summary>The first of two layers is not used: its part of the gradient is zero.</summary>
    [Test]
    public void PartsOfAnOutputHaveTheirOwnGradients()
    {
        using var device = new CpuDevice(1, 1 << 20, DType.F64);
        var graph = new Graph(device);
        Tensor dx = Some(device, 2, Tokens, Cols), w = Some(device, 3, 3, Cols);
        Tensor x = graph.Parameter(Some(device, 1, Tokens, Cols), dx);
        Tensor other = Some(device, 4, Cols, Cols), none = Tensor.None;
        var op = new Linears([new(Cols), new(3)]);
        Span<Tensor> parts = new Tensor[2];
        Tensor y = graph.Run(op, x, other, none, none, none, w, none, none, none);
        graph.Split(y, parts, [Cols, 3]);
        Assert.That(() => graph.Split(y, new Tensor[1], [2]), Throws.Exception);
        graph.Backward(graph.Run(new Scale(2), parts[1]), 1);
        double[] weights = Read(device, w), got = Read(device, dx);
        for (int i = 0; i < got.Length; i++)
            Assert.That(got[i], Is.EqualTo(2 * Enumerable.Range(0, 3)
                .Sum(r => weights[(r * Cols) + (i % Cols)])).Within(1e-12));
    }

    /// <summary>
    /// y = x + x w^T, whose two gradients could not share memory: the product's is read while the
    /// other is added to.
    /// </summary>
    [Test]
    public void AGradientIsNotLentToAnOperationThatAddsToIt()
    {
        using var device = new CpuDevice(1, 1 << 20, DType.F64);
        var graph = new Graph(device);
        Tensor dv = Some(device, 2, Tokens, Cols), w = Some(device, 3, Cols, Cols);
        Tensor v = graph.Parameter(Some(device, 1, Tokens, Cols), dv);
        Tensor x = graph.Run(new Scale(3), v);
        graph.Backward(graph.Run(new Add(), x, graph.Run(new Linear(), x, w)), 1);
        double[] weights = Read(device, w), got = Read(device, dv);
        for (int i = 0; i < got.Length; i++)
            Assert.That(got[i], Is.EqualTo(3 * (1 + Enumerable.Range(0, Cols)
                .Sum(r => weights[(r * Cols) + (i % Cols)]))).Within(1e-12));
    }

    [Test]
    public void MisuseIsRefusedByName()
    {
        using var device = new CpuDevice(1, 1 << 20);
        var graph = new Graph(device);
        Tensor x = Some(device, 1, Tokens, Cols), dx = Some(device, 2, Tokens, Cols);
        Tensor cos = Some(device, 3, Tokens, 2), dCos = Some(device, 4, Tokens, 2);
        Tensor sin = Some(device, 5, Tokens, 2);
        Tensor positions = device.Allocate(new(DType.I32, new Shape(Tokens)), "positions");
        x = graph.Parameter(x, dx);
        cos = graph.Parameter(cos, dCos);
        Assert.That(() => graph.Run(new Add(), x, x),
            Throws.TypeOf<ShapeException>().With.Message.Contain(
                "add: inputs 0 and 1 are the same"));
        Assert.That(() => graph.Run(new Rope(4), x, positions, cos, sin),
            Throws.TypeOf<ShapeException>().With.Message.Contain("rope: input 2 has no gradient"));
        Assert.That(() => graph.Backward(x, 1), Throws.InvalidOperationException);
        Tensor y = graph.Run(new Add(), x, dx);
        Assert.That(() => graph.Parameter(dCos, cos), Throws.InvalidOperationException);
        Assert.That(() => graph.Keep(default, y), Throws.InvalidOperationException);
        Assert.That(() => graph.Parameter(dCos, sin with { Spec = dx.Spec }), Throws.Exception);
    }

    [Test]
    public void WhatAnOpSavedCanBeRead()
    {
        using var network = new Network(checkpoint: false);
        network.Graph.Device.Random = new(1, 0, false);
        Span<Tensor> saved = new Tensor[3];
        network.Graph.Recording = false;
        Tensor loss = network.Forward(saved);
        float[] sum = new float[1], each = new float[3], correct = new float[3];
        network.Graph.Device.Read<float>(loss, sum);
        network.Graph.Device.Read<float>(saved[0], each);
        network.Graph.Device.Read<float>(saved[1], correct);
        Assert.That(each.Sum(), Is.EqualTo(sum[0]).Within(1e-6));
        Assert.That(each, Is.All.GreaterThan(0));
        Assert.That(correct, Is.All.EqualTo(0).Or.All.EqualTo(1).Or.Some.EqualTo(1));
        network.Graph.EndStep();
    }

    [Test]
    public void UnreachedGradientsBecomeZero()
    {
        using var device = new CpuDevice(1, 1 << 20);
        var graph = new Graph(device);
        Tensor gradient = Some(device, 2, 4);
        graph.Parameter(Some(device, 1, 4), gradient);
        graph.ZeroUnreachedGradients();
        var got = new float[4];
        device.Read<float>(gradient, got);
        Assert.That(got, Is.All.Zero);
    }

    private static double[] Read(CpuDevice device, Tensor tensor)
    {
        var values = new double[tensor.Shape.Count];
        device.Read<double>(tensor, values);
        return values;
    }

    private static Tensor Some(CpuDevice device, int seed, params int[] sizes)
    {
        Tensor tensor = device.Allocate(new(device.Activations, new Shape(sizes)), "test");
        double[] values = Fill.Normal(seed, tensor.Shape.Count, 0.5);
        if (device.Activations == DType.F64) device.Write<double>(tensor, values);
        else device.Write<float>(tensor, Array.ConvertAll(values, v => (float)v));
        return tensor;
    }

    /// <summary>
    /// Two blocks x + silu(u) * lora(norm(x)), each half of x's columns normalised by itself, then
    /// the loss.
    /// </summary>
    private sealed class Network : IDisposable
    {
        private readonly CpuDevice _device;
        private readonly Block[] _blocks;
        private readonly bool _checkpoint;
        private readonly Tensor _x, _head, _rows, _targets, _weights, _gradients;
        private readonly CrossEntropy _loss = new();
        private readonly int _parameters;

        public Network(bool checkpoint, DType type = DType.F32)
        {
            _checkpoint = checkpoint;
            _device = new CpuDevice(2, 1 << 22, type);
            Graph = new Graph(_device);
            _x = Some(_device, 1, Tokens, Cols);
            _head = Some(_device, 2, Vocabulary, Cols);
            _rows = Ints(0, 2, 3);
            _targets = Ints(10, 0, 4);
            _parameters = 2 * 2 * Rank * Cols;
            _weights = Some(_device, 3, _parameters);
            _gradients = Some(_device, 4, _parameters);
            _blocks = [new(this, 0), new(this, 1)];
        }

        public Graph Graph { get; }

        public double[] Gradients => Read(_gradients);

        public double Step(int step, bool clear = true, double seed = 1)
        {
            Run(step, clear, seed);
            return LastLoss;
        }

        private double LastLoss { get; set; }

        public void Run(int step, bool clear, double seed)
        {
            _device.Random = new(99, (ulong)step, true);
            if (clear) Graph.ClearGradients();
            Tensor loss = Forward([]);
            LastLoss = First(loss);
            Graph.Backward(loss, seed);
            Graph.EndStep();
        }

        public double LossWith(int parameter, double moved, int step)
        {
            double[] values = Read(_weights);
            values[parameter] += moved;
            _device.Write<double>(_weights, values);
            Graph.Recording = false;
            _device.Random = new(99, (ulong)step, true);
            double loss = First(Forward([]));
            Graph.EndStep();
            Graph.Recording = true;
            values[parameter] -= moved;
            _device.Write<double>(_weights, values);
            return loss;
        }

        public Tensor Forward(Span<Tensor> saved)
        {
            Tensor x = _x;
            foreach (Block block in _blocks) x = Graph.Run(block, x, this, _checkpoint);
            return Graph.Run(_loss, saved, x, _head, _rows, _targets);
        }

        public void Dispose() => _device.Dispose();

        private unsafe double First(Tensor loss) =>
            loss.Type == DType.F64 ? *(double*)loss.Data : *(float*)loss.Data;

        private double[] Read(Tensor tensor)
        {
            var values = new double[tensor.Shape.Count];
            if (tensor.Type == DType.F64)
            {
                _device.Read<double>(tensor, values);
                return values;
            }

            var floats = new float[values.Length];
            _device.Read<float>(tensor, floats);
            return Array.ConvertAll(floats, v => (double)v);
        }

        private Tensor Ints(params int[] values)
        {
            Tensor tensor = _device.Allocate(new(DType.I32, new Shape(values.Length)), "ints");
            _device.Write<int>(tensor, values);
            return tensor;
        }

        private sealed class Block : IBlock<object>
        {
            private readonly RmsNorm _norm = new(1e-6);
            private readonly LoraLinear _lora;
            private readonly SwiGlu _gate = new();
            private readonly Add _add = new();
            private readonly Tensor _scale, _w, _u, _a, _b;

            public Block(Network network, int index)
            {
                CpuDevice device = network._device;
                _lora = new LoraLinear(index, 2, 0.25);
                _scale = Some(device, 10 + index, Cols / 2);
                _w = Some(device, 20 + index, Cols, Cols);
                _u = Some(device, 30 + index, Tokens, Cols);
                int first = index * 2 * Rank * Cols;
                _a = Parameter(network, first).Reshape(Rank, Cols);
                _b = Parameter(network, first + (Rank * Cols)).Reshape(Cols, Rank);
            }

            public bool Trainable => true;

            public Tensor Forward(Graph graph, Tensor x, object context)
            {
                Tensor y = graph.Run(_norm, x.Reshape(2 * Tokens, Cols / 2), _scale);
                y = y.Reshape(Tokens, Cols);
                y = graph.Run(_lora, y, _w, Tensor.None, _a, _b);
                return graph.Run(_add, x, graph.Run(_gate, _u, y));
            }

            private static Tensor Parameter(Network network, int first) => network.Graph.Parameter(
                network._weights.Slice(first, Rank * Cols),
                network._gradients.Slice(first, Rank * Cols));
        }
    }
}
