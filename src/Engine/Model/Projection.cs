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
    private readonly Op _op;
    private readonly Tensor _bias, _a, _b;
    private readonly bool _adapted;

    public Projection(Weight weight, Tensor bias)
    {
        (_op, Weight, _bias) = (new Linear(Weight: Other(weight)), weight, bias);
        Trainable = weight.Tensor.Variable != 0 || bias.Variable != 0;
    }

    public Projection(Weight weight, Tensor bias, Adapter adapter, double dropout, Tensor a,
        Tensor b)
    {
        (_op, Weight, _bias, _a, _b) = (
            new LoraLinear(adapter.Index, adapter.Scale, dropout, Other(weight)), weight, bias, a,
            b);
        _adapted = Trainable = true;
    }

    public bool Trainable { get; }

    /// <summary>Whether backward reads x: where its own weights are frozen, it does not.</summary>
    public bool ReadsInput => _adapted || Weight.Tensor.Variable != 0;

    /// <summary>What x is multiplied by.</summary>
    public Weight Weight { get; }

    /// <summary>x[rows, in] -> y[rows, out].</summary>
    public Tensor Run(Graph graph, Tensor x) => _adapted
        ? graph.Run(_op, x, Weight.Tensor, _bias, _a, _b)
        : graph.Run(_op, x, Weight.Tensor, _bias);

    /// <summary>The same, <see cref="Graph.RunFleeting"/>.</summary>
    public Tensor RunFleeting(Graph graph, Tensor x) => _adapted
        ? graph.RunFleeting(_op, x, Weight.Tensor, _bias, _a, _b)
        : graph.RunFleeting(_op, x, Weight.Tensor, _bias);

    /// <summary>One or the other.</summary>
    public Tensor Run(Graph graph, Tensor x, bool fleeting) =>
        fleeting ? RunFleeting(graph, x) : Run(graph, x);

    // Dense weights are an input, so that the tape can give them a gradient.
    private static Weight? Other(Weight weight) => weight is DenseWeight ? null : weight;
}

/// <summary>A normalisation with its weight and, where it has one, its bias.</summary>
public sealed class Norm(Op op, Tensor weight, Tensor bias)
{
    public bool Trainable { get; } = weight.Variable != 0 || bias.Variable != 0;

    public Tensor Run(Graph graph, Tensor x, bool fleeting = false) => (bias.Exists, fleeting) switch
    {
        (true, true) => graph.RunFleeting(op, x, weight, bias),
        (true, false) => graph.Run(op, x, weight, bias),
        (false, true) => graph.RunFleeting(op, x, weight),
        _ => graph.Run(op, x, weight),
    };
}
