using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>A layer of a transformer as a block of the tape: what follows from its parts.</summary>
/// <param name="streamed">The layer's place, where its tensors may be streamed.</param>
internal abstract class Layer<TContext>(ModuleScope? streamed = null) : IBlock<TContext>
    where TContext : class
{
    private readonly StreamedBlock? _streamed = streamed?.BeginBlock();

    public bool Trainable { get; private set; }

    public abstract Tensor Forward(Graph graph, Tensor x, TContext context);

    public void Acquire(bool backward) => _streamed?.Acquire(backward);

    public void Release() => _streamed?.Release();

    /// <summary>Names what it is made of, once all of it is there.</summary>
    protected void Holds(Projection[] projections, params ReadOnlySpan<Norm?> norms) =>
        Holds(projections, false, norms);

    /// <summary>The same with parts of which something may be trained besides.</summary>
    protected void Holds(
        Projection[] projections, bool trainable, params ReadOnlySpan<Norm?> norms)
    {
        _streamed?.End();
        Trainable = trainable || Array.Exists(projections, p => p.Trainable);
        foreach (Norm? norm in norms) Trainable |= norm is { Trainable: true };
    }
}
