using MiniCpmNative.GpuEmulator.Driver;
using MiniCpmNative.GpuEmulator.Machine;
using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.GpuEmulator.Ptx;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.GpuEmulator;

/// <summary>
/// A CUDA device without a GPU, behind the function table that production fills from libcuda and
/// libcublas. PTX is interpreted with checks that hardware does not make; a finding becomes the
/// driver's error of the next synchronising call, its one-line report the error's text, and the
/// device stays broken, as a real context does. One device exists at a time.
/// </summary>
public sealed class EmulatedGpu : IDisposable
{
    private readonly Dictionary<nint, object> _handles = [];
    private readonly List<LaunchCounters> _launches = [];
    private nint _nextHandle = 0x1000;
    private ulong _launchSeed;

    public EmulatedGpu(EmulatorOptions? options = null, NvrtcApi? nvrtc = null)
    {
        Options = options ?? new();
        Memory = new(Options.MemoryBytes);
        Scheduler = new(Options.Seed);
        DefaultStream = new(0);
        Scheduler.Add(DefaultStream);
        _launchSeed = (ulong)Options.Seed * 0x9E3779B97F4A7C15;
        if (Current != null) throw new InvalidOperationException("one emulated GPU at a time");
        Current = this;
        Api = new(DriverEntryPoints.Table(), nvrtc ?? new(), CublasEntryPoints.Table());
    }

    /// <summary>The device behind the static entry points.</summary>
    internal static EmulatedGpu? Current { get; private set; }

    /// <summary>What production gets instead of the real libraries.</summary>
    public CudaApi Api { get; }
    public EmulatorOptions Options { get; }

    /// <summary>The first finding; null while all is well.</summary>
    public Fault? Fault { get; private set; }

    /// <summary>Counters of every launch that ran, in order.</summary>
    public IReadOnlyList<LaunchCounters> Launches => _launches;
    public long MemoryInUse => Memory.Used;

    internal DeviceMemory Memory { get; }
    internal Scheduler Scheduler { get; }
    internal EmulatedStream DefaultStream { get; }
    internal Lock Gate { get; } = new();
    /// <summary>Why the last call was refused, for cuGetErrorString.</summary>
    internal string LastError { get; set; } = "";
    internal HashSet<nint> Pinned { get; } = [];

    /// <summary>Makes [address, address + bytes) count as never written (an arena's reused
    /// memory).</summary>
    public unsafe void Forget(ulong address, long bytes)
    {
        var allocation = Memory.Find(address);
        if (allocation == null || allocation.Freed || !allocation.Holds(address, bytes))
            throw new ArgumentException($"0x{address:x} + {bytes} is no device memory",
                nameof(address));
        new Span<byte>(allocation.State + (address - allocation.Start), (int)bytes).Clear();
    }

    public void ClearLaunches() => _launches.Clear();

    internal nint Register(object thing)
    {
        _handles[++_nextHandle] = thing;
        return _nextHandle;
    }

    internal T? Find<T>(nint handle) where T : class => _handles.GetValueOrDefault(handle) as T;

    internal void Forget(nint handle) => _handles.Remove(handle);

    internal EmulatedStream? Stream(nint handle) => handle == 0 ? DefaultStream
        : Find<EmulatedStream>(handle);

    /// <summary>Keeps the first fault and gives its driver error.</summary>
    internal int Report(Fault fault)
    {
        Fault ??= fault;
        return Results.Of(Fault.Check);
    }

    /// <summary>Runs queued work; the driver's result afterwards.</summary>
    internal int RunUntil(Func<bool> done)
    {
        if (Fault != null) return Results.Of(Fault.Check);
        try
        {
            return Scheduler.RunUntil(done)
                ? Results.Success
                : Report(new(Check.Deadlock, "streams wait for events that are never recorded",
                "the scheduler"));
        }
        catch (FaultException e)
        {
            return Report(e.Fault);
        }
        catch (Exception e)
        {
            return Report(new(Check.Internal, e.ToString(), "the emulator"));
        }
    }

    internal void Launch(Launch launch)
    {
        _launches.Add(GridRunner.Run(launch));
    }

    internal ulong NextLaunchSeed() => Options.Seed == 0
        ? 0
        : _launchSeed = (_launchSeed * 6364136223846793005) + 1442695040888963407;

    public void Dispose()
    {
        lock (Gate)
        {
            Memory.Clear();
            if (Current == this) Current = null;
        }
    }
}
