using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels;

/// <summary>
/// Where tensors live and operations run. Three lifetimes of memory: run (allocated once), step
/// (the arena), and between (gradients of activations, kept by the tape).
/// All calls come from one thread.
/// </summary>
public abstract class Device : IDisposable
{
    /// <summary>Memory of the running step.</summary>
    public abstract Arena Step { get; }

    /// <summary>Type in which activations are kept.</summary>
    public abstract DType Activations { get; }

    /// <summary>Bytes of the device's memory that the run takes so far.</summary>
    public abstract long MemoryInUse { get; }

    /// <summary>Key of this step's random numbers.</summary>
    public Randomness Random { get; set; } = new(0, 0, Dropout: false);

    /// <summary>Zeroed memory that lives as long as the device.</summary>
    public abstract Tensor Allocate(Spec spec, string name);

    /// <summary>
    /// The same in the host's memory, where the device's kernels read and write it; None on a
    /// device whose memory that is, and where the host has not as much for it.
    /// </summary>
    public virtual Tensor HostTensor(Spec spec, string name) => Tensor.None;

    /// <summary>In host memory where that is wanted and there is some, else on the
    /// device.</summary>
    public Tensor AllocateIn(bool host, Spec spec, string name) =>
        host && HostTensor(spec, name) is { Exists: true } tensor ? tensor : Allocate(spec, name);

    /// <summary>
    /// Where operations of the streamed block that is being made find a trained tensor, or its
    /// gradient, that lies in the given place between steps; that place where no block is.
    /// </summary>
    public virtual Tensor Visiting(in Tensor home, bool isGradient) => home;

    /// <summary>
    /// The next matrices that visit, of so many bytes in all, lie behind each other as they do at
    /// home, so that they are multiplied by in the same way.
    /// </summary>
    public virtual void VisitTogether(long bytes)
    {
    }

    /// <summary>Trained tensors were changed where they lie between steps.</summary>
    public virtual void ForgetVisiting()
    {
    }

    /// <summary>The gradients of a step begin: what is there is of the one before.</summary>
    public virtual void ForgetGradients()
    {
    }

    /// <summary>What follows finds gradients where they lie between steps.</summary>
    public virtual void BringGradientsHome()
    {
    }

    /// <summary>
    /// Room of the given size that lives as long as the device, for the tape's gradients.
    /// </summary>
    public abstract nint Reserve(long bytes);

    /// <summary>Bytes that a matrix takes in the device's own packed form.</summary>
    public abstract long PackedBytes(DType type, int rows, int cols);

    /// <summary>
    /// The next matrices to be packed, of so many bytes in all, lie behind each other where the
    /// device can then multiply by them as one.
    /// </summary>
    public virtual void PackTogether(long bytes)
    {
    }

    /// <summary>
    /// Packs a row-major matrix in host memory into a new frozen weight; null leaves it undefined.
    /// </summary>
    public abstract unsafe Tensor Pack(DType type, int rows, int cols, void* source, string name);

    /// <summary>
    /// What is allocated until the block's end is the block's, and lies in host memory where the
    /// device's is another; null where it is not.
    /// </summary>
    /// <param name="sequence">Blocks of one number run one after the other.</param>
    /// <param name="hasContent">False where tensors have none, for a plan.</param>
    public virtual StreamedBlock? BeginStreamed(int sequence, bool hasContent = true) => null;

    /// <summary>
    /// A block runs again, and backward through it follows: what its frozen weights are unpacked to
    /// may be kept for that, in memory of this pool.
    /// </summary>
    public virtual void BeginAgain(ITensorPool pool)
    {
    }

    /// <summary>Its gradients are there; also when it threw.</summary>
    public virtual void EndAgain()
    {
    }

    public abstract void Forward(Op op, in OpCall call);

    public abstract void Backward(Op op, in OpCall call);

    /// <summary>
    /// into = norm, clipping factor and number of non-finite elements of all these gradient ranges
    /// together; maxNorm 0 or below does not clip. Losses (may be None) are only looked through for
    /// elements that are not finite.
    /// </summary>
    public abstract void GradientNorm(
        ReadOnlySpan<Tensor> gradients, double maxNorm, in Tensor into, in Tensor losses);

    /// <summary>
    /// One optimizer step over a range, with gradients times the factor in norm (None: 1). Where
    /// norm counts non-finite gradients, nothing changes.
    /// </summary>
    public abstract void Update(in UpdateStep step, in UpdateRange range, in Tensor norm);

    public abstract void Fill(in Tensor tensor, double value);

    /// <summary>
    /// Copies bytes between tensors of the same spec on this device; they may overlap.
    /// </summary>
    public abstract void Copy(in Tensor from, in Tensor to);

    /// <summary>Copies host elements in; their number and type must be the tensor's.</summary>
    public abstract void Write<T>(in Tensor tensor, ReadOnlySpan<T> values)
        where T : unmanaged;

    /// <summary>Copies all bytes of a tensor in from host memory.</summary>
    public abstract unsafe void Upload(in Tensor tensor, void* source);

    /// <summary>Waits for the device and copies elements out.</summary>
    public abstract void Read<T>(in Tensor tensor, Span<T> values)
        where T : unmanaged;

    /// <summary>Memory for the inputs of forward passes; lives as long as the device.</summary>
    public abstract InputMemory NewInput();

    /// <summary>
    /// Room for results of these bytes at most on the host; lives as long as the device.
    /// </summary>
    public abstract Readback NewReadback(int bytes);

    public abstract void Dispose();
}

/// <summary>
/// Key of counter-based random numbers: the same seed, step, layer and element give the same number
/// on every device and in every recomputation. Dropout is off in evaluation.
/// </summary>
public readonly record struct Randomness(ulong Seed, ulong Step, bool Dropout);
