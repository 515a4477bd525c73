using System.Runtime.CompilerServices;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// A CUDA GPU as a device: kernels.cu compiled for the storage type of activations, products by
/// cuBLAS, everything queued on one stream in the order of the calls; only reading waits. Weights
/// and other tensors of the run are allocated as they come; activations and their gradients share
/// one piece, which the first step takes: as large as was planned, else most of what is left.
/// </summary>
public sealed unsafe partial class CudaDevice : Device
{
    // Small tensors share an allocation; each starts on a line of its own.
    private const long SharedBytes = 4 << 20, LargestShared = 1 << 20, Alignment = 256;

    // Of what is free, without a plan; the rest is left to the driver and tables that grow later.
    private const double StepShare = 0.92;

    private readonly CudaGemm _gemm;
    private readonly Staging _staging;
    private readonly List<DeviceSlab> _slabs = [];
    private DeviceSlab? _step;
    private readonly List<IDisposable> _owned = [];
    private readonly (Tensor From, GradientTarget To)[] _casts = new (Tensor, GradientTarget)[16];
    private int _castCount;
    private nint _shared;
    private long _sharedLeft;
    private nint _together;
    private long _togetherLeft;

    /// <param name="context">The GPU; disposed by its owner.</param>
    /// <param name="compiler">Compiles the kernels.</param>
    /// <param name="activations">BF16 or F32.</param>
    /// <param name="stepBytes">Size of the step's memory; null takes what is free at the first
    /// step.</param>
    /// <param name="lineInfo">Keeps source lines in the compiled code.</param>
    public CudaDevice(CudaContext context, ModuleCompiler compiler, DType activations,
        long? stepBytes = null, bool lineInfo = false)
        : this(context, activations, stepBytes,
            CudaKernels.Load(context, compiler, activations, lineInfo))
    {
    }

    /// <summary>With kernels that were compiled elsewhere.</summary>
    public CudaDevice(CudaContext context, DType activations, long? stepBytes, CudaKernels kernels)
    {
        if (activations is not (DType.F32 or DType.BF16))
            throw new ArgumentException("a GPU computes in F32 or BF16", nameof(activations));
        (Context, Activations, StepBytes, Kernels) = (context, activations, stepBytes, kernels);
        Stream = new(context);
        _gemm = new(context, Stream);
        _staging = new(context, Stream);
        Faults = Allocate(new Spec(DType.I32, new Shape(4)), "faults");
        Step = new Arena(() =>
        {
            Stream.Synchronise();
            long bytes = StepBytes ?? (long)(Context.Memory().Free * StepShare);
            bytes = Math.Max(Alignment, bytes / Alignment * Alignment);
            _step = new DeviceSlab(Context, bytes);
            return ((nint)_step.Address, bytes);
        });
    }

    public CudaContext Context { get; }

    public CudaStream Stream { get; }

    /// <summary>The kernels that it launches.</summary>
    public CudaKernels Kernels { get; }

    /// <summary>What a plan needs to know of it.</summary>
    public CardFigures Card => new(
        Context.Name, Context.Multiprocessors, Context.Architecture, Context.Memory().Total)
    {
        SharedBytes = Context.MaxSharedBytes,
        Hopper = Kernels.Hopper,
    };

    public int CublasVersion => _gemm.Version;

    /// <summary>
    /// Whether products of F32 are made in TF32, with 10 bits of mantissa: not unless said.
    /// </summary>
    public bool Tf32
    {
        get => _gemm.Tf32;
        init => _gemm.Tf32 = value;
    }

    /// <summary>Sees what is queued from now on; null, as at first, for nobody.</summary>
    public ILaunchWatch? Watch { get; set; }

    public override Arena Step { get; }

    public override DType Activations { get; }

    /// <summary>
    /// Bytes of the step's memory, taken by the first step; null takes most of what is free then.
    /// </summary>
    public long? StepBytes { get; set; }

    /// <summary>Sees to it, between two steps, that the next ones have so many bytes.</summary>
    /// <exception cref="DeviceMemoryException">There are not so many.</exception>
    public void ReserveStep(long bytes)
    {
        if (bytes <= Step.Reserved) return;
        Stream.Synchronise();
        Step.Release();
        _step?.Dispose();
        (_step, StepBytes) = (null, bytes);
    }

    /// <summary>What lives as long as the run, and the most that a step needed.</summary>
    public override long MemoryInUse => Context.HeldBytes - Step.Reserved + Step.Needed;

    /// <summary>
    /// I32[4]: the first wrong index that a kernel met; see <see cref="KernelFault"/>.
    /// </summary>
    internal Tensor Faults { get; }

    public override Tensor Allocate(Spec spec, string name)
    {
        var tensor = new Tensor(Reserve(spec.Bytes), spec);
        if (spec.Bytes > 0) Stream.Fill((ulong)tensor.Data, 0, spec.Bytes);
        return tensor;
    }

    public override nint Reserve(long bytes)
    {
        if (_open is not null) return _open.Reserve(bytes);
        if (bytes > LargestShared) return Hold(bytes);
        long rounded = Math.Max(Alignment, (bytes + Alignment - 1) / Alignment * Alignment);
        if (rounded > _sharedLeft) (_shared, _sharedLeft) = (Hold(SharedBytes), SharedBytes);
        nint data = _shared;
        _shared += (nint)rounded;
        _sharedLeft -= rounded;
        return data;
    }

    public override void PackTogether(long bytes) =>
        (_together, _togetherLeft) = (_open?.Reserve(bytes) ?? Hold(bytes), bytes);

    public override long PackedBytes(DType type, int rows, int cols) =>
        (long)rows * cols * Activations.Size();

    /// <summary>
    /// cuBLAS reads matrices as they are: packing only brings them to the storage type.
    /// </summary>
    public override Tensor Pack(DType type, int rows, int cols, void* source, string name)
    {
        var shape = new Shape(rows, cols);
        var weight = new Tensor(
            Place(PackedBytes(type, rows, cols)), new Spec(Activations, shape, Layout.Packed));
        if (source is null) return weight;
        if (type == Activations)
        {
            _staging.Upload(weight.Data, source, weight.Spec.Bytes);
            return weight;
        }

        const int Rows = 256;
        var stored = new Tensor(0, new Spec(type, new Shape(Rows, cols)));
        using var slab = new DeviceSlab(Context, Math.Max(1, stored.Spec.Bytes));
        for (int r = 0; r < rows; r += Rows)
        {
            var part = new Spec(type, new Shape(Math.Min(Rows, rows - r), cols));
            _staging.Upload(
                (nint)slab.Address, (byte*)source + ((long)r * cols * type.Size()), part.Bytes);
            Tensor to = new(
                weight.Data + (nint)((long)r * cols * Activations.Size()), part.As(Activations));
            Cast(new Tensor((nint)slab.Address, part), to, accumulate: false);
        }

        Stream.Synchronise();
        return weight;
    }

    public override void Forward(Op op, in OpCall call)
    {
        Check(call);
        Watch?.Operation(op, call, backward: false);
        ArenaMark mark = Step.Mark();
        op.CudaForward(new CudaCall(this, op, call));
        Step.Pop(mark);
    }

    public override void Backward(Op op, in OpCall call)
    {
        Check(call);
        Watch?.Operation(op, call, backward: true);
        ArenaMark mark = Step.Mark();
        _castCount = 0;
        _unpacked.InBackward = true;
        op.CudaBackward(new CudaCall(this, op, call));
        _unpacked.InBackward = false;
        for (int i = 0; i < _castCount; i++)
            Cast(_casts[i].From, _casts[i].To.Buffer, _casts[i].To.Accumulate);
        Step.Pop(mark);
    }

    public override void GradientNorm(
        ReadOnlySpan<Tensor> gradients, double maxNorm, in Tensor into, in Tensor losses) =>
        CudaGradientNorm.Run(this, gradients, maxNorm, into, losses);

    public override void Update(in UpdateStep step, in UpdateRange range, in Tensor norm)
    {
        range.Check(DType.F32, step.Rule);
        if (step.Rule == UpdateRule.Adafactor) CudaAdafactor.Run(this, step, range, norm);
        else CudaUpdate.Run(this, step, range, norm);
    }

    public override void Fill(in Tensor tensor, double value)
    {
        Step.Check(tensor);
        long count = tensor.Shape.Count;
        if (count == 0) return;
        bool words = tensor.Type == DType.F32 && Activations != DType.F32;
        if (value != 0 && !words)
        {
            Launch("fill_real", Grid.Eights(count), [tensor, value, count]);
            return;
        }

        Watch?.Begin(new("fill", tensor.Spec.Bytes)
        {
            HostBytes = IsOnHost(tensor.Data) ? tensor.Spec.Bytes : 0,
        });
        if (value == 0) Stream.Fill((ulong)tensor.Data, 0, tensor.Spec.Bytes);
        else
            Stream.FillWords(
                (ulong)tensor.Data, BitConverter.SingleToUInt32Bits((float)value), count);
        Watch?.End();
    }

    public override void Copy(in Tensor from, in Tensor to)
    {
        Step.Check(from);
        Step.Check(to);
        if (from.Spec != to.Spec) throw new ShapeException($"copy of {from.Spec} to {to.Spec}");
        long bytes = to.Spec.Bytes, distance = Math.Abs(from.Data - to.Data);
        if (bytes == 0 || distance == 0) return;
        Watch?.Begin(new("copy", 2 * bytes));
        if (distance >= bytes) Stream.Copy((ulong)to.Data, (ulong)from.Data, bytes);
        else CopyOverlapping(from.Data, to.Data, bytes, distance);
        Watch?.End();
    }

    // A copy between overlapping ranges is undefined: by way of scratch, it is two that are not.
    // The source may have left the stack and lie above its top, so the scratch lies as far above.
    private void CopyOverlapping(nint from, nint to, long bytes, long distance)
    {
        ArenaMark mark = Step.Mark();
        long words = (bytes + distance + 7) / 8, rows = (words + 1023) / 1024;
        Tensor room = Step.Push(new Spec(DType.I64, new Shape((int)rows, 1024)), "copy");
        ulong scratch = (ulong)room.Data + (ulong)distance;
        Stream.Copy(scratch, (ulong)from, bytes);
        Stream.Copy((ulong)to, scratch, bytes);
        Step.Pop(mark);
    }

    public override void Write<T>(in Tensor tensor, ReadOnlySpan<T> values)
    {
        MustHold<T>(tensor, values.Length);
        fixed (T* from = values) _staging.Upload(tensor.Data, from, tensor.Spec.Bytes);
    }

    public override void Upload(in Tensor tensor, void* source)
    {
        Step.Check(tensor);
        _staging.Upload(tensor.Data, source, tensor.Spec.Bytes);
    }

    /// <exception cref="ShapeException">A kernel met a wrong index since the last read.</exception>
    public override void Read<T>(in Tensor tensor, Span<T> values)
    {
        MustHold<T>(tensor, values.Length);
        fixed (T* to = values) _staging.Download(to, tensor.Data, tensor.Spec.Bytes);
        ThrowIfFaulty();
    }

    public override InputMemory NewInput() => Own(new CudaInput(Context, Stream));

    public override Readback NewReadback(int bytes) => Own(new CudaReadback(this, bytes));

    public override void Dispose()
    {
        // Queued work may still use what goes now; what it came to no longer matters.
        Context.Api.Driver.StreamSynchronize(Stream.Handle);
        DisposeStreams();
        foreach (IDisposable owned in _owned) owned.Dispose();
        _owned.Clear();
        _staging.Dispose();
        _gemm.Dispose();
        foreach (DeviceSlab slab in _slabs) slab.Dispose();
        _slabs.Clear();
        _unpacked.Dispose();
        _step?.Dispose();
        Kernels.Dispose();
        Stream.Dispose();
    }

    internal void Launch(string kernel, Grid grid, ReadOnlySpan<KernelArgument> arguments)
    {
        if (grid.Blocks.X == 0 || grid.Blocks.Y == 0 || grid.Blocks.Z == 0) return;
        CudaKernel function = Kernels[kernel];
        function.AllowShared(grid.SharedBytes);
        LaunchArguments packed = function.Arguments();
        foreach (ref readonly KernelArgument argument in arguments) packed.Add(argument);
        Watch?.Begin(QueuedWork.Kernel(kernel, arguments, IsOnHost));
        packed.Launch(Stream, grid.Blocks, grid.Threads, grid.SharedBytes);
        Watch?.End();
    }

    /// <summary>c = alpha a b + beta c.</summary>
    internal void Multiply(CudaMatrix a, CudaMatrix b, CudaMatrix c, double alpha, double beta)
    {
        if (c.Rows == 0 || c.Cols == 0) return;
        if (a.Cols == 0)
        {
            if (beta == 0) Fill(c.Data, 0);
            return;
        }

        Watch?.Begin(QueuedWork.Product(a, b, c, adds: beta != 0));
        _gemm.Multiply(a, b, c, alpha, beta);
        Watch?.End();
    }

    /// <summary>to = from in to's type, or adds it.</summary>
    internal void Cast(in Tensor from, in Tensor to, bool accumulate)
    {
        if (from.Shape.Count != to.Shape.Count
            || from.Type is not (DType.F32 or DType.BF16 or DType.F16))
            throw new ShapeException($"cast of {from.Spec} to {to.Spec}");
        // The kernel reads any float type.
        string kernel = to.Type == Activations ? "cast_to_real" : "cast_to_float";
        Launch(kernel, Grid.Eights(to.Shape.Count),
            [to, from, (int)from.Type, to.Shape.Count, accumulate]);
    }

    /// <summary>
    /// Casts a gradient into where it is wanted when the running operation is done.
    /// </summary>
    internal void CastWhenDone(in Tensor from, in GradientTarget to) =>
        _casts[_castCount++] = (from, to);

    /// <exception cref="ShapeException">These words of Faults tell of a wrong index.</exception>
    internal void ThrowIfFaulty(ReadOnlySpan<int> words)
    {
        if (words[0] == 0) return;
        Fill(Faults, 0);
        throw KernelFaults.Describe(words);
    }

    private void ThrowIfFaulty()
    {
        Span<int> words = stackalloc int[4];
        fixed (int* to = words) _staging.Download(to, Faults.Data, Faults.Spec.Bytes);
        ThrowIfFaulty(words);
    }

    private T Own<T>(T owned)
        where T : IDisposable
    {
        _owned.Add(owned);
        return owned;
    }

    private nint Place(long bytes)
    {
        if (bytes > _togetherLeft) return Reserve(bytes);
        nint data = _together;
        (_together, _togetherLeft) = (data + (nint)bytes, _togetherLeft - bytes);
        return data;
    }

    private nint Hold(long bytes)
    {
        var slab = new DeviceSlab(Context, bytes);
        _slabs.Add(slab);
        return (nint)slab.Address;
    }

    private void MustHold<T>(in Tensor tensor, int count)
        where T : unmanaged
    {
        Step.Check(tensor);
        if ((long)count * Unsafe.SizeOf<T>() != tensor.Spec.Bytes)
            throw new ShapeException(
                $"{count} elements of {Unsafe.SizeOf<T>()} bytes for {tensor.Spec}");
    }

    private void Check(in OpCall call)
    {
        foreach (ref readonly Tensor tensor in call.Inputs) Step.Check(tensor);
        foreach (ref readonly Tensor tensor in call.Saved) Step.Check(tensor);
        Step.Check(call.Output);
    }
}
