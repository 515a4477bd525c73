using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels;

/// <summary>
/// An operation, declared once: its fields are its hyper-parameters, so that it prints itself in
/// errors and benchmark rows; models make each instance once and run it every step. It has one
/// differentiable output. The shape rule, forward and backward stand together in one file.
/// </summary>
public abstract record Op(string Name)
{
    /// <summary>
    /// The shape rule: what comes out of these inputs (absent ones do not exist), and what is saved
    /// for backward. activations is the type in which the device keeps activations.
    /// </summary>
    /// <exception cref="ShapeException">
    /// An input does not fit; names op, argument, expected, got.
    /// </exception>
    public abstract Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations);

    /// <summary>
    /// Whether a gradient exists for this input; asking for one that does not exist throws.
    /// </summary>
    public abstract bool Differentiates(int input);

    /// <summary>
    /// Whether backward reads the values of this input when those that are trained want gradients;
    /// where it does not, they need not be there any more.
    /// </summary>
    public virtual bool BackwardReads(int input, ReadOnlySpan<bool> trained) => true;

    /// <summary>
    /// Whether this input's gradient is the output's as it is, which the tape then hands over
    /// without asking for it.
    /// </summary>
    public virtual bool PassesGradient(int input) => false;

    /// <summary>
    /// Whether its forward, given no output, makes only what it saves: for an output that nobody
    /// reads.
    /// </summary>
    public virtual bool CanSkipOutput => false;

    /// <summary>
    /// The input that it changes in place, which is then its result in the output's stead: it has
    /// no gradient and is not recorded. Null for all others, which leave their inputs alone.
    /// </summary>
    public virtual int? Writes => null;

    /// <summary>
    /// Computes the output and what is saved, in float, or double in gradient checks.
    /// </summary>
    public abstract void CpuForward<T>(in CpuCall<T> call)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>;

    /// <summary>
    /// Computes the wanted input gradients from inputs, output, saved and output gradient.
    /// </summary>
    public abstract void CpuBackward<T>(in CpuCall<T> call)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>;

    /// <summary>
    /// Queues the kernels and products that compute the output and what is saved.
    /// </summary>
    public abstract void CudaForward(in CudaCall call);

    /// <summary>Queues what computes the wanted input gradients.</summary>
    public abstract void CudaBackward(in CudaCall call);
}

/// <summary>The tensors of one run of an operation; the gradients only in a backward.</summary>
public readonly ref struct OpCall(
    ReadOnlySpan<Tensor> inputs,
    Tensor output,
    ReadOnlySpan<Tensor> saved,
    bool recorded,
    Tensor outputGradient = default,
    ReadOnlySpan<GradientTarget> gradients = default)
{
    public ReadOnlySpan<Tensor> Inputs { get; } = inputs;

    public Tensor Output { get; } = output;

    public ReadOnlySpan<Tensor> Saved { get; } = saved;

    /// <summary>False in a forward whose backward will never come.</summary>
    public bool Recorded { get; } = recorded;

    public Tensor OutputGradient { get; } = outputGradient;

    public ReadOnlySpan<GradientTarget> Gradients { get; } = gradients;
}
