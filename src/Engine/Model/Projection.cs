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
    private readonly Tensor _weight, _bias, _a, _b;
    private readonly bool _adapted;

    public Projection(Tensor weight, Tensor bias)
    {
        (_op, _weight, _bias) = (new Linear(), weight, bias);
        Trainable = weight.Variable != 0 || bias.Variable != 0;
    }

    public Projection(Tensor weight, Tensor bias, LoraLinear adapter, Tensor a, Tensor b)
    {
        (_op, _weight, _bias, _a, _b) = (adapter, weight, bias, a, b);
        _adapted = Trainable = true;
    }

    public bool Trainable { get; }

    /// <summary>x[rows, in] -> y[rows, out].</summary>
    public Tensor Run(Graph graph, Tensor x) => _adapted
        ? graph.Run(_op, x, _weight, _bias, _a, _b)
        : graph.Run(_op, x, _weight, _bias);
}

/// <summary>A normalisation with its weight and, where it has one, its bias.</summary>
public sealed class Norm(Op op, Tensor weight, Tensor bias)
{
    public bool Trainable { get; } = weight.Variable != 0 || bias.Variable != 0;

    public Tensor Run(Graph graph, Tensor x) => bias.Exists
        ? graph.Run(op, x, weight, bias)
        : graph.Run(op, x, weight);
}
