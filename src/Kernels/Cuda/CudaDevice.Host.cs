namespace MiniCpmNative.Kernels.Cuda;

/// <content>What of a run lies in the host's memory.</content>
public sealed unsafe partial class CudaDevice
{
    private readonly List<(int Sequence, CudaWeightStream Stream)> _streams = [];
    private readonly List<PinnedMemory> _host = [];
    private CudaStream? _copy, _back;
    private CudaWeightStream.Block? _open;
    private nint _visit, _visitHome;
    private long _visitLeft;

    /// <summary>Bytes of weights that lie in host memory and come over block by block.</summary>
    public long StreamedBytes => _streams.Sum(s => s.Stream.Bytes);

    /// <summary>Those of one sequence of blocks.</summary>
    public long StreamedBytesOf(int sequence) =>
        _streams.Find(s => s.Sequence == sequence).Stream?.Bytes ?? 0;

    /// <summary>Bytes of them that the driver refused to page-lock.</summary>
    public long PageableBytes => _streams.Sum(s => s.Stream.PageableBytes);

    /// <summary>Bytes of host tensors.</summary>
    public long HostBytes => _host.Sum(memory => memory.Bytes);

    /// <summary>Bytes of host tensors that the driver refused to page-lock.</summary>
    public long RefusedHostBytes { get; private set; }

    /// <summary>Bytes of blocks that came over so far.</summary>
    public long StreamedSoFar => _streams.Sum(s => s.Stream.CopiedBytes);

    /// <summary>Bytes of gradients that went back so far.</summary>
    public long StreamedBack => _streams.Sum(s => s.Stream.CopiedBack);

    /// <summary>
    /// Page-locked: kernels reach it over the bus, as fast as it is where they read neighbours.
    /// </summary>
    public override Tensor HostTensor(Spec spec, string name)
    {
        PinnedMemory memory;
        try
        {
            memory = Own(new PinnedMemory(Context, Math.Max(1, spec.Bytes), forKernels: true));
        }
        catch (Exception refused) when (refused is CudaException or DeviceMemoryException)
        {
            RefusedHostBytes += spec.Bytes;
            return Tensor.None;
        }

        _host.Add(memory);
        var tensor = new Tensor((nint)memory.Pointer, spec);
        if (spec.Bytes > 0) Stream.Fill((ulong)tensor.Data, 0, spec.Bytes);
        return tensor;
    }

    public override Tensor Visiting(in Tensor home, bool isGradient)
    {
        if (_open is null) return home;
        long bytes = home.Spec.Bytes;
        bool isNext = !isGradient && home.Shape.Rank == 2 && bytes <= _visitLeft
            && (_visitHome == 0 || _visitHome == home.Data);
        nint data = isNext ? _visit : _open.ReserveVisiting(bytes);
        if (isNext)
            (_visit, _visitHome, _visitLeft) =
                (_visit + (nint)bytes, home.Data + (nint)bytes, _visitLeft - bytes);
        _open.Visit(new((ulong)data, bytes)
        {
            Host = home.Data,
            IsOnDevice = !IsOnHost(home.Data),
        }, isGradient);
        return home with { Data = data };
    }

    public override void VisitTogether(long bytes)
    {
        if (_open is not null)
            (_visit, _visitHome, _visitLeft) = (_open.ReserveVisiting(bytes), 0, bytes);
    }

    public override void ForgetVisiting()
    {
        foreach (var (_, stream) in _streams) stream.Forget();
    }

    public override void ForgetGradients()
    {
        foreach (var (_, stream) in _streams) stream.ForgetGradients();
    }

    public override void BringGradientsHome()
    {
        foreach (var (_, stream) in _streams) stream.BringHome();
    }

    public override StreamedBlock BeginStreamed(int sequence, bool hasContent = true)
    {
        if (_open is not null) throw new InvalidOperationException("blocks have no blocks in them");
        CudaWeightStream? stream = _streams.Find(s => s.Sequence == sequence).Stream;
        if (stream is null)
            _streams.Add((sequence,
                stream = new(this, _copy ??= new(Context), _back ??= new(Context))));
        return _open = stream.Begin(hasContent);
    }

    /// <summary>Whether an address is that of a host tensor.</summary>
    internal bool IsOnHost(nint address)
    {
        foreach (PinnedMemory memory in _host)
            if (address >= (nint)memory.Pointer
                && address < (nint)memory.Pointer + (nint)memory.Bytes)
                return true;
        return false;
    }

    // The block that is open has ended; room that was held for its matrices is its own.
    internal void EndStreamed() => (_open, _togetherLeft, _visitLeft) = (null, 0, 0);

    private void DisposeStreams()
    {
        if (_copy is not null) Context.Api.Driver.StreamSynchronize(_copy.Handle);
        if (_back is not null) Context.Api.Driver.StreamSynchronize(_back.Handle);
        foreach (var (_, stream) in _streams) stream.Dispose();
        _copy?.Dispose();
        _back?.Dispose();
    }
}
