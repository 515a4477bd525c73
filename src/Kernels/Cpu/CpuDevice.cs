using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// The processor as a device: managed SIMD kernels on all cores, activations in F32. The arena
/// reserves address space as large as the machine's memory; pages are taken when first touched, so
/// that only what a step really uses counts. An F64 device exists for gradient checks.
/// </summary>
public sealed unsafe class CpuDevice : Device
{
    private const long DefaultStepBytes = 1L << 36, LeastStepBytes = 64 << 20;

    // A mapping of its own takes a whole huge page, however small the tensor; small ones share.
    private const long SharedBytes = 4 << 20, LargestShared = 1 << 20, Alignment = 256;

    private readonly List<HugeMemory> _memory = [];
    private nint _shared;
    private long _sharedLeft;

    /// <param name="threads">Threads to compute on; null takes all processors.</param>
    /// <param name="stepBytes">Largest size of the step arena; null takes the machine's
    /// memory.</param>
    /// <param name="activations">F32, or F64 for gradient checks.</param>
    public CpuDevice(int? threads = null, long? stepBytes = null, DType activations = DType.F32)
    {
        if (activations is not (DType.F32 or DType.F64))
            throw new ArgumentException("the CPU computes in F32 or F64", nameof(activations));
        Activations = activations;
        Workers = new Workers(threads);
        Gemm = new Gemm(Workers);
        long bytes = stepBytes ?? Math.Min(
            DefaultStepBytes, GC.GetGCMemoryInfo().TotalAvailableMemoryBytes);
        Step = new Arena(() => stepBytes is null ? ReserveMost(bytes) : (Reserve(bytes), bytes));
    }

    // A limit of the address space (ulimit -v) is known by what is refused; a quarter of what is
    // taken stays for pictures, threads and the heap.
    private (nint, long) ReserveMost(long bytes)
    {
        for (long most = bytes; ; most -= most / 4)
        {
            try
            {
                if (most == bytes) return (Reserve(most), most);
                new HugeMemory(most).Dispose();
                long taken = most / 4 * 3;
                return (Reserve(taken), taken);
            }
            catch (DeviceMemoryException) when (most > LeastStepBytes)
            {
            }
        }
    }

    public Workers Workers { get; }

    public Gemm Gemm { get; }

    public override Arena Step { get; }

    public override DType Activations { get; }

    /// <summary>The process's: pages that were touched, not the range that is reserved.</summary>
    public override long MemoryInUse => Environment.WorkingSet;

    /// <summary>Bytes of all tensors that live as long as the device.</summary>
    public long AllocatedBytes { get; private set; }

    public override Tensor Allocate(Spec spec, string name) => new(Hold(spec.Bytes), spec);

    public override nint Reserve(long bytes)
    {
        if (bytes > LargestShared) return Map(bytes);
        long rounded = (bytes + Alignment - 1) / Alignment * Alignment;
        if (rounded > _sharedLeft) (_shared, _sharedLeft) = (Map(SharedBytes), SharedBytes);
        nint data = _shared;
        _shared += (nint)rounded;
        _sharedLeft -= rounded;
        return data;
    }

    public override long PackedBytes(DType type, int rows, int cols) =>
        PackedMatrix.Bytes(rows, cols, type);

    public override Tensor Pack(DType type, int rows, int cols, void* source, string name)
    {
        nint memory = Hold(PackedBytes(type, rows, cols));
        if (source is not null)
            PackedMatrix.Pack(Workers, new MatrixView(source, type, rows, cols), (void*)memory);
        return new Tensor(memory, new Spec(type, new Shape(rows, cols), Layout.Packed));
    }

    public override void Forward(Op op, in OpCall call)
    {
        Check(call);
        ArenaMark mark = Step.Mark();
        if (Activations == DType.F64) op.CpuForward(new CpuCall<double>(this, op, call));
        else op.CpuForward(new CpuCall<float>(this, op, call));
        Step.Pop(mark);
    }

    public override void Backward(Op op, in OpCall call)
    {
        Check(call);
        ArenaMark mark = Step.Mark();
        if (Activations == DType.F64) op.CpuBackward(new CpuCall<double>(this, op, call));
        else op.CpuBackward(new CpuCall<float>(this, op, call));
        Step.Pop(mark);
    }

    public override void GradientNorm(
        ReadOnlySpan<Tensor> gradients, double maxNorm, in Tensor into, in Tensor losses)
    {
        double squares = 0, nonFinite = 0, ignored = 0;
        foreach (ref readonly Tensor gradient in gradients)
            Add(gradient, ref squares, ref nonFinite);
        if (losses.Exists) Add(losses, ref ignored, ref nonFinite);
        Write(into, [Updates.GradientNorm.Of(squares, nonFinite, maxNorm)]);
    }

    private void Add(in Tensor gradient, ref double squares, ref double nonFinite)
    {
        if (gradient.Type != Activations)
            throw new ShapeException($"gradient_norm: a gradient of {gradient.Spec}");
        if (Activations == DType.F64)
            CpuGradientNorm.Add<double>(Workers, Step, gradient, ref squares, ref nonFinite);
        else
            CpuGradientNorm.Add<float>(Workers, Step, gradient, ref squares, ref nonFinite);
    }

    public override void Update(in AdamW step, in AdamWRange range, in Tensor norm)
    {
        range.Check(Activations);
        var of = new GradientNorm(0, 1, 0);
        if (norm.Exists) Read(norm, new Span<GradientNorm>(ref of));
        if (of.NonFinite > 0) return;
        if (Activations == DType.F64) CpuAdamW.Run<double>(Workers, step, range, of.Factor);
        else CpuAdamW.Run<float>(Workers, step, range, of.Factor);
    }

    public override void Fill(in Tensor tensor, double value)
    {
        Step.Check(tensor);
        int count = checked((int)tensor.Shape.Count);
        if (value == 0) NativeMemory.Clear((void*)tensor.Data, (nuint)tensor.Spec.Bytes);
        else if (tensor.Type == DType.F32)
            new Span<float>((void*)tensor.Data, count).Fill((float)value);
        else if (tensor.Type == DType.F64) new Span<double>((void*)tensor.Data, count).Fill(value);
        else throw new ShapeException($"fill of {tensor.Spec} with {value}");
    }

    public override void Copy(in Tensor from, in Tensor to)
    {
        Step.Check(from);
        Step.Check(to);
        if (from.Spec != to.Spec) throw new ShapeException($"copy of {from.Spec} to {to.Spec}");
        Buffer.MemoryCopy((void*)from.Data, (void*)to.Data, to.Spec.Bytes, from.Spec.Bytes);
    }

    public override void Write<T>(in Tensor tensor, ReadOnlySpan<T> values) =>
        values.CopyTo(Elements<T>(tensor, values.Length));

    public override void Upload(in Tensor tensor, void* source)
    {
        Step.Check(tensor);
        Buffer.MemoryCopy(source, (void*)tensor.Data, tensor.Spec.Bytes, tensor.Spec.Bytes);
    }

    public override void Read<T>(in Tensor tensor, Span<T> values) =>
        Elements<T>(tensor, values.Length).CopyTo(values);

    public override InputMemory NewInput() => new CpuInput(this);

    public override Readback NewReadback(int bytes) => new CpuReadback(this, bytes);

    public override void Dispose()
    {
        Gemm.Dispose();
        Workers.Dispose();
        foreach (var memory in _memory) memory.Dispose();
        _memory.Clear();
    }

    private nint Map(long bytes)
    {
        var memory = new HugeMemory(bytes);
        _memory.Add(memory);
        return (nint)memory.Data;
    }

    private nint Hold(long bytes)
    {
        AllocatedBytes += bytes;
        return Reserve(bytes);
    }

    private Span<T> Elements<T>(in Tensor tensor, int count)
        where T : unmanaged
    {
        Step.Check(tensor);
        if ((long)count * Unsafe.SizeOf<T>() != tensor.Spec.Bytes)
            throw new ShapeException(
                $"{count} elements of {Unsafe.SizeOf<T>()} bytes for {tensor.Spec}");
        return new Span<T>((void*)tensor.Data, count);
    }

    private void Check(in OpCall call)
    {
        foreach (ref readonly Tensor tensor in call.Inputs) Step.Check(tensor);
        foreach (ref readonly Tensor tensor in call.Saved) Step.Check(tensor);
        Step.Check(call.Output);
    }
}
