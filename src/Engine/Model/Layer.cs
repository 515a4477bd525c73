using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>A layer of a transformer as a block of the tape: what follows from its parts.</summary>
internal abstract class Layer<TContext> : IBlock<TContext>
    where TContext : class
{
    private Projection[] _projections = [];

    public bool Trainable { get; private set; }

    public abstract Tensor Forward(Graph graph, Tensor x, TContext context);

    public void Acquire()
    {
        foreach (Projection projection in _projections) projection.Weight.Acquire();
    }

    public void Release()
    {
        foreach (Projection projection in _projections) projection.Weight.Release();
    }

    /// <summary>Names what it is made of, once all of it is there.</summary>
    protected void Holds(Projection[] projections, params ReadOnlySpan<Norm?> norms) =>
        Holds(projections, false, norms);

    /// <summary>The same with parts of which something may be trained besides.</summary>
    protected void Holds(
        Projection[] projections, bool trainable, params ReadOnlySpan<Norm?> norms)
    {
        _projections = projections;
        Trainable = trainable || Array.Exists(projections, p => p.Trainable);
        foreach (Norm? norm in norms) Trainable |= norm is { Trainable: true };
    }
}
