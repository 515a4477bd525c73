using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A linear layer of the model, y = x W^T + b, with or without a low-rank adapter. Which operation
/// runs was decided when the model was built; the model itself only calls it.
/// </summary>
public sealed class Projection
{
    // x, the weight and its bias; where there is an adapter A and B, and of one with magnitudes
    // these and the norms of the adapted rows.
    private readonly Tensor[] _inputs;
    private readonly Op _op;
    private readonly AdaptedNorm? _norm;
    private readonly Tensor _squares, _bias, _biasOfB;
    private readonly Op? _addBias;

    public Projection(Weight weight, Tensor bias)
    {
        (_op, Weight) = (new Linear(Weight: Other(weight)), weight);
        _inputs = [Tensor.None, weight.Tensor, bias];
        Trainable = weight.Tensor.Variable != 0 || bias.Variable != 0;
    }

    /// <param name="weight">The frozen weight.</param>
    /// <param name="bias">Its bias, or none.</param>
    /// <param name="adapter">Its adapter.</param>
    /// <param name="dropout">Share of the adapter's input that is dropped.</param>
    /// <param name="a">Its first matrix.</param>
    /// <param name="b">Its second matrix.</param>
    /// <param name="biasOfB">That one's bias, which counts as often as the matrix, or none.</param>
    public Projection(Weight weight, Tensor bias, Adapter adapter, double dropout, Tensor a,
        Tensor b, Tensor biasOfB = default)
    {
        (_op, Weight) = (
            new LoraLinear(adapter.Index, adapter.Scale, dropout, Other(weight)), weight);
        _inputs = [Tensor.None, weight.Tensor, bias, a, b];
        Trainable = true;
        Adapter = adapter;
        Dropout = dropout;
        (_bias, _biasOfB) = (bias, biasOfB);
        if (biasOfB.Exists)
            _addBias = bias.Exists ? new Add(adapter.Scale) : new Scale(adapter.Scale);
    }

    /// <param name="weight">The frozen weight.</param>
    /// <param name="bias">Its bias, or none.</param>
    /// <param name="adapter">An adapter with magnitudes.</param>
    /// <param name="dropout">Share of its input that is dropped.</param>
    /// <param name="a">Its first matrix.</param>
    /// <param name="b">Its second matrix.</param>
    /// <param name="magnitude">F32, one for each row of the weight.</param>
    /// <param name="squares">The squared norms of those rows.</param>
    public Projection(Weight weight, Tensor bias, Adapter adapter, double dropout, Tensor a,
        Tensor b, Tensor magnitude, Tensor squares)
        : this(weight, bias, adapter, dropout, a, b)
    {
        _op = new DoraLinear(adapter.Index, adapter.Scale, dropout, Other(weight));
        _norm = new AdaptedNorm(adapter.Scale, Other(weight));
        _inputs = [.. _inputs, magnitude, Tensor.None];
        _squares = squares;
    }

    /// <summary>Where it has one.</summary>
    public Adapter? Adapter { get; }

    public double Dropout { get; }

    public bool Trainable { get; }

    /// <summary>Whether backward reads x: where its own weights are frozen, it does not.</summary>
    public bool ReadsInput => Adapter is not null || Weight.Tensor.Variable != 0;

    /// <summary>What x is multiplied by.</summary>
    public Weight Weight { get; }

    /// <summary>x[rows, in] -> y[rows, out].</summary>
    public Tensor Run(Graph graph, Tensor x) => graph.Run(_op, Inputs(graph, x));

    /// <summary>The same, <see cref="Graph.RunFleeting"/>.</summary>
    public Tensor RunFleeting(Graph graph, Tensor x) => graph.RunFleeting(_op, Inputs(graph, x));

    /// <summary>Its weight, bias, A and B as an operation takes them.</summary>
    internal void CopyTo(Span<Tensor> inputs) =>
        _inputs.AsSpan(1, Adapter is null ? 2 : 4).CopyTo(inputs);

    private Tensor[] Inputs(Graph graph, Tensor x)
    {
        _inputs[0] = x;
        if (_norm is not null) _inputs[^1] = Norms(graph);
        if (_addBias is not null)
            _inputs[2] = _bias.Exists
                ? graph.Run(_addBias, _bias, _biasOfB) : graph.Run(_addBias, _biasOfB);
        return _inputs;
    }

    // Held constant in backward: what it is made of is no variable there.
    private Tensor Norms(Graph graph) => graph.Run(_norm!, Weight.Tensor,
        _inputs[3] with { Variable = 0 }, _inputs[4] with { Variable = 0 }, _squares);

    // Dense weights are an input, so that the tape can give them a gradient.
    internal static Weight? Other(Weight weight) => weight is DenseWeight ? null : weight;
}

/// <summary>
/// Linear layers of one input, which run together: queries, keys and values, whose heads may be
/// rotated on the way, or gate and up of a feed-forward. Where their adapters differ in rank or
/// scale, or have magnitudes or biases, they run one after the other.
/// </summary>
public sealed class Projections
{
    private const int Each = 4;

    private readonly Linears? _op;
    private readonly Tensor[] _inputs = [];
    private readonly int[] _columns;
    private readonly Projection[] _apart = [];
    private readonly Rope _rope;
    private readonly int _rotated;

    /// <param name="layers">The layers.</param>
    /// <param name="columns">The outputs of each.</param>
    /// <param name="headDim">Columns of a head, or 0 where columns are no heads.</param>
    /// <param name="rotated">How many of the layers have their heads rotated.</param>
    public Projections(Projection[] layers, int[] columns, int headDim = 0, int rotated = 0)
    {
        Projection? adapted = Array.Find(layers, layer => layer.Adapter is not null);
        (_columns, _rotated, _rope) = (columns, rotated, new Rope(headDim));
        ReadsInput = Array.Exists(layers, layer => layer.ReadsInput);
        if (Array.Exists(layers, layer => layer.Adapter is { } its
            && (its.IsDora || its.HasBias
                || (its.Rank, its.Scale) != (adapted!.Adapter!.Rank, adapted.Adapter.Scale))))
        {
            _apart = layers;
            return;
        }

        _op = new Linears(
            [.. layers.Select((layer, i) => new LinearPart(
                columns[i], layer.Adapter?.Index ?? 0, Projection.Other(layer.Weight)))],
            adapted?.Adapter!.Scale ?? 1, adapted?.Dropout ?? 0, headDim, rotated);
        _inputs = new Tensor[1 + (Each * layers.Length) + (rotated > 0 ? 3 : 0)];
        for (int i = 0; i < layers.Length; i++) layers[i].CopyTo(_inputs.AsSpan(1 + (Each * i)));
    }

    /// <summary>Whether backward reads x.</summary>
    public bool ReadsInput { get; }

    /// <summary>x[rows, in] -> y of each, [rows, its columns].</summary>
    public void Run(Graph graph, Tensor x, Span<Tensor> y, bool fleeting = false)
    {
        if (_op is null)
        {
            for (int i = 0; i < _apart.Length; i++)
                y[i] = fleeting ? _apart[i].RunFleeting(graph, x) : _apart[i].Run(graph, x);
            return;
        }

        _inputs[0] = x;
        graph.Split(
            fleeting ? graph.RunFleeting(_op, _inputs) : graph.Run(_op, _inputs), y, _columns);
    }

    /// <summary>Whether they run as one operation.</summary>
    public bool AreOne => _op is not null;

    /// <summary>The same, as it lies in memory: one matrix behind the other. Of layers that run as
    /// one.</summary>
    public Tensor RunWhole(Graph graph, Tensor x)
    {
        _inputs[0] = x;
        return graph.Run(_op!, _inputs);
    }

    /// <summary>The same with heads rotated: positions I32[rows] in the tables cos and
    /// sin.</summary>
    public void Run(
        Graph graph, Tensor x, Tensor positions, Tensor cos, Tensor sin, Span<Tensor> y)
    {
        if (_op?.Rotated > 0) (_inputs[^3], _inputs[^2], _inputs[^1]) = (positions, cos, sin);
        if (_op is not null || _rotated == 0)
        {
            Run(graph, x, y);
            return;
        }

        for (int i = 0; i < _apart.Length; i++)
        {
            if (i >= _rotated)
            {
                y[i] = _apart[i].Run(graph, x);
                continue;
            }

            Tensor straight = _apart[i].RunFleeting(graph, x);
            y[i] = graph.Run(_rope, straight, positions, cos, sin);
            graph.Drop(straight);
        }
    }
}

/// <summary>A normalisation with its weight and, where it has one, its bias.</summary>
public sealed class Norm(Op op, Tensor weight, Tensor bias)
{
    public bool Trainable { get; } = weight.Variable != 0 || bias.Variable != 0;

    public Tensor Run(Graph graph, Tensor x, bool fleeting = false) =>
        (bias.Exists, fleeting) switch
        {
            (true, true) => graph.RunFleeting(op, x, weight, bias),
            (true, false) => graph.Run(op, x, weight, bias),
            (false, true) => graph.RunFleeting(op, x, weight),
            _ => graph.Run(op, x, weight),
        };

    /// <summary>Of a norm whose result is gated: x and gate alike.</summary>
    public Tensor Run(Graph graph, Tensor x, Tensor gate) => graph.Run(op, x, weight, gate);
}
