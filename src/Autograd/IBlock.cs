using MiniCpmNative.Kernels;

namespace MiniCpmNative.Autograd;

/// <summary>
/// A piece of a model with one activation in and one out, which can be run again. Whatever else
/// it needs to know of the rows it runs on is its context.
/// </summary>
public interface IBlock<in TContext> : IBlock
    where TContext : class
{
    Tensor Forward(Graph graph, Tensor x, TContext context);
}

/// <summary>What the tape needs to know of a block besides running it.</summary>
public interface IBlock
{
    /// <summary>Whether it has parameters that need gradients.</summary>
    bool Trainable { get; }

    /// <summary>
    /// The block is about to run, forward, or again in backward: its weights may come to the
    /// device. In a backward without checkpoint nothing is said: a block whose weights come and go
    /// has one.
    /// </summary>
    /// <param name="backward">Whether gradients follow.</param>
    void Acquire(bool backward)
    {
    }

    /// <summary>
    /// It has run, in backward with what follows from it; once for each Acquire, also when it
    /// threw.
    /// </summary>
    void Release()
    {
    }
}
