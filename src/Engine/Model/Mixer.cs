using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>The part of a decoder's layer in which tokens see those before them.</summary>
internal abstract class Mixer
{
    /// <summary>Its linear layers.</summary>
    public Projection[] Projections { get; protected init; } = [];

    /// <summary>Whether anything in it besides them is trained.</summary>
    public bool Trainable { get; protected init; }

    /// <summary>Whether backward reads the normalised rows that it runs on.</summary>
    public abstract bool ReadsInput { get; }

    /// <summary>
    /// a[tokens, width], which it drops, -> what is added to the rows, fleeting.
    /// </summary>
    public abstract Tensor Run(Graph graph, Tensor a, DecoderContext context);
}
