namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Input in two halves, each with page-locked memory of its size: while the device computes on one,
/// the host fills the other and a stream of its own copies it over. Two events keep order:
/// computing waits for the copy, and a half is filled again when all work on it is done. So the
/// host runs at most two inputs ahead of the device.
/// </summary>
internal sealed class CudaInput : InputMemory, IDisposable
{
    private readonly CudaStream _compute, _copy;
    private readonly Half[] _halves;
    private int _turn;
    private long _used;

    public CudaInput(CudaContext context, CudaStream compute)
    {
        _compute = compute;
        _copy = new(context);
        _halves = [new(context), new(context)];
    }

    public override void Begin(long bytes)
    {
        _halves[_turn].Done.Record(_compute);
        _turn ^= 1;
        _halves[_turn].Done.Synchronise();
        _halves[_turn].Reserve(bytes);
        // The other one too at the start, before the step takes most of what is left.
        if (_halves[_turn ^ 1].Capacity == 0) _halves[_turn ^ 1].Reserve(bytes);
        _used = 0;
    }

    public override unsafe Tensor Push(Spec spec, string name, out nint host)
    {
        Half half = _halves[_turn];
        long end = _used + ((spec.Bytes + Alignment - 1) / Alignment * Alignment);
        if (end > half.Capacity)
            throw new InvalidOperationException(
                $"{name} {spec} does not fit into {half.Capacity:N0} bytes");
        host = (nint)half.Pinned!.Pointer + (nint)_used;
        var tensor = new Tensor((nint)half.Slab!.Address + (nint)_used, spec);
        _used = end;
        return tensor;
    }

    public override unsafe void Send()
    {
        Half half = _halves[_turn];
        if (_used > 0) _copy.Upload(half.Slab!.Address, half.Pinned!.Pointer, _used);
        half.Sent.Record(_copy);
        _compute.Wait(half.Sent);
    }

    public void Dispose()
    {
        foreach (Half half in _halves) half.Dispose();
        _copy.Dispose();
    }

    private sealed class Half(CudaContext context) : IDisposable
    {
        private const long Step = 1 << 20;

        public CudaEvent Sent { get; } = new(context);

        public CudaEvent Done { get; } = new(context);

        public DeviceSlab? Slab { get; private set; }

        public PinnedMemory? Pinned { get; private set; }

        public long Capacity { get; private set; }

        // A quarter more than asked for, so that slowly growing inputs seldom need more.
        public void Reserve(long bytes)
        {
            if (bytes <= Capacity) return;
            Slab?.Dispose();
            Pinned?.Dispose();
            Capacity = 0;
            long size = (bytes + (bytes / 4) + Step - 1) / Step * Step;
            Slab = new(context, size);
            Pinned = new(context, size);
            Capacity = size;
        }

        public void Dispose()
        {
            Slab?.Dispose();
            Pinned?.Dispose();
            Sent.Dispose();
            Done.Dispose();
        }
    }
}
