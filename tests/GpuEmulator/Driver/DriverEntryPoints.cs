using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>The driver's table: device, context, memory, streams and events of the emulated
/// GPU.</summary>
internal static unsafe partial class DriverEntryPoints
{
    private const string DeviceName = "Emulated GPU";
    private static byte* s_text;

    private static EmulatedGpu Gpu => EmulatedGpu.Current
        ?? throw new InvalidOperationException("no emulated GPU exists");

    public static CudaDriverApi Table() => new()
    {
        Path = "the emulator",
        Init = &Init,
        DriverGetVersion = &DriverGetVersion,
        DeviceGetCount = &DeviceGetCount,
        DeviceGet = &DeviceGet,
        DeviceGetName = &DeviceGetName,
        DeviceGetAttribute = &DeviceGetAttribute,
        DeviceTotalMem = &DeviceTotalMem,
        DevicePrimaryCtxRetain = &DevicePrimaryCtxRetain,
        DevicePrimaryCtxRelease = &DevicePrimaryCtxRelease,
        CtxSetCurrent = &CtxSetCurrent,
        CtxSynchronize = &CtxSynchronize,
        MemGetInfo = &MemGetInfo,
        MemAlloc = &MemAlloc,
        MemFree = &MemFree,
        MemHostAlloc = &MemHostAlloc,
        MemFreeHost = &MemFreeHost,
        MemcpyHtoDAsync = &MemcpyHtoDAsync,
        MemcpyDtoHAsync = &MemcpyDtoHAsync,
        MemcpyDtoDAsync = &MemcpyDtoDAsync,
        MemsetD8Async = &MemsetD8Async,
        MemsetD32Async = &MemsetD32Async,
        StreamCreate = &StreamCreate,
        StreamDestroy = &StreamDestroy,
        StreamSynchronize = &StreamSynchronize,
        StreamWaitEvent = &StreamWaitEvent,
        EventCreate = &EventCreate,
        EventDestroy = &EventDestroy,
        EventRecord = &EventRecord,
        EventSynchronize = &EventSynchronize,
        EventQuery = &EventQuery,
        EventElapsedTime = &EventElapsedTime,
        ModuleLoadDataEx = &ModuleLoadDataEx,
        ModuleUnload = &ModuleUnload,
        ModuleGetFunction = &ModuleGetFunction,
        FuncSetAttribute = &FuncSetAttribute,
        FuncGetAttribute = &FuncGetAttribute,
        OccupancyMaxActiveBlocks = &OccupancyMaxActiveBlocks,
        LaunchKernel = &LaunchKernel,
        GetErrorName = &GetErrorName,
        GetErrorString = &GetErrorString,
    };

    [UnmanagedCallersOnly]
    private static int Init(uint flags) => flags == 0 ? Results.Success : Results.InvalidValue;

    [UnmanagedCallersOnly]
    private static int DriverGetVersion(int* version) => Set(version, 13000);

    [UnmanagedCallersOnly]
    private static int DeviceGetCount(int* count) => Set(count, 1);

    [UnmanagedCallersOnly]
    private static int DeviceGet(int* device, int ordinal) =>
        ordinal == 0 ? Set(device, 0) : Results.InvalidDevice;

    [UnmanagedCallersOnly]
    private static int DeviceGetName(byte* name, int length, int device)
    {
        if (device != 0 || length <= DeviceName.Length) return Results.InvalidValue;
        int count = Encoding.ASCII.GetBytes(DeviceName, new Span<byte>(name, length));
        name[count] = 0;
        return Results.Success;
    }

    [UnmanagedCallersOnly]
    private static int DeviceGetAttribute(int* value, int attribute, int device) => device != 0
        ? Results.InvalidDevice
        : attribute switch
        {
            1 => Set(value, 1024), // MAX_THREADS_PER_BLOCK
            8 => Set(value, 48 << 10), // MAX_SHARED_MEMORY_PER_BLOCK
            10 => Set(value, 32), // WARP_SIZE
            16 => Set(value, 4), // MULTIPROCESSOR_COUNT
            75 => Set(value, Gpu.Options.Architecture / 10),
            76 => Set(value, Gpu.Options.Architecture % 10),
            97 => Set(value, OptInShared()), // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            _ => Results.InvalidValue,
        };

    /// <summary>Largest dynamic shared memory of the architecture (CUDA programming guide, table of
    /// limits).</summary>
    internal static int OptInShared() => (Gpu.Options.Architecture switch
    {
        80 => 163,
        90 or 100 => 227,
        _ => 99,
    }) << 10;

    [UnmanagedCallersOnly]
    private static int DeviceTotalMem(nuint* bytes, int device)
    {
        *bytes = (nuint)Gpu.Memory.Capacity;
        return Results.Success;
    }

    [UnmanagedCallersOnly]
    private static int DevicePrimaryCtxRetain(nint* context, int device)
    {
        *context = 1;
        return device == 0 ? Results.Success : Results.InvalidDevice;
    }

    [UnmanagedCallersOnly]
    private static int DevicePrimaryCtxRelease(int device) => Results.Success;

    [UnmanagedCallersOnly]
    private static int CtxSetCurrent(nint context) =>
        context is 0 or 1 ? Results.Success : Results.InvalidContext;

    [UnmanagedCallersOnly]
    private static int CtxSynchronize()
    {
        var gpu = Gpu;
        lock (gpu.Gate) return Drain(gpu);
    }

    private static int Drain(EmulatedGpu gpu) => gpu.RunUntil(() => gpu.Scheduler.IsIdle);

    [UnmanagedCallersOnly]
    private static int StreamCreate(nint* stream, uint flags)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            var created = new EmulatedStream(0);
            gpu.Scheduler.Add(created);
            *stream = gpu.Register(created);
            return Results.Success;
        }
    }

    [UnmanagedCallersOnly]
    private static int StreamDestroy(nint handle) => With(handle, (gpu, stream) =>
    {
        if (handle == 0) return Results.InvalidHandle;
        int result = gpu.RunUntil(() => stream.Work.Count == 0);
        if (result == Results.Success) gpu.Scheduler.Remove(stream);
        gpu.Forget(handle);
        return result;
    });

    [UnmanagedCallersOnly]
    private static int StreamSynchronize(nint handle) =>
        With(handle, (gpu, stream) => gpu.RunUntil(() => stream.Work.Count == 0));

    [UnmanagedCallersOnly]
    private static int StreamWaitEvent(nint handle, nint eventHandle, uint flags) =>
        With(handle, (gpu, stream) =>
    {
        if (gpu.Find<EmulatedEvent>(eventHandle) is not { } e) return Results.InvalidHandle;
        int wanted = e.Recorded;
        stream.Work.Enqueue((() => e.Reached >= wanted, () => { }));
        return Results.Success;
    });

    [UnmanagedCallersOnly]
    private static int EventCreate(nint* created, uint flags)
    {
        var gpu = Gpu;
        lock (gpu.Gate) *created = gpu.Register(new EmulatedEvent());
        return Results.Success;
    }

    [UnmanagedCallersOnly]
    private static int EventDestroy(nint handle)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<EmulatedEvent>(handle) == null) return Results.InvalidHandle;
            gpu.Forget(handle);
            return Results.Success;
        }
    }

    [UnmanagedCallersOnly]
    private static int EventRecord(nint eventHandle, nint handle) => With(handle, (gpu, stream) =>
    {
        if (gpu.Find<EmulatedEvent>(eventHandle) is not { } e) return Results.InvalidHandle;
        int number = ++e.Recorded;
        stream.Work.Enqueue((null, () =>
        {
            e.Reached = number;
            e.Ticks = Stopwatch.GetTimestamp();
        }
        ));
        return Results.Success;
    });

    [UnmanagedCallersOnly]
    private static int EventSynchronize(nint handle)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<EmulatedEvent>(handle) is not { } e) return Results.InvalidHandle;
            int wanted = e.Recorded;
            return gpu.RunUntil(() => e.Reached >= wanted);
        }
    }

    [UnmanagedCallersOnly]
    private static int EventQuery(nint handle)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<EmulatedEvent>(handle) is not { } e) return Results.InvalidHandle;
            if (e.Reached >= e.Recorded) return Results.Success;
            // Asking lets one item run, so that a host that polls gets on.
            bool ran = false;
            int result = gpu.RunUntil(() => ran || !(ran = true));
            return result != Results.Success ? result
                : e.Reached >= e.Recorded ? Results.Success : Results.NotReady;
        }
    }

    [UnmanagedCallersOnly]
    private static int EventElapsedTime(float* milliseconds, nint start, nint end)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<EmulatedEvent>(start) is not { } a
                || gpu.Find<EmulatedEvent>(end) is not { } b)
                return Results.InvalidHandle;
            if (a.Reached < a.Recorded || b.Reached < b.Recorded) return Results.NotReady;
            *milliseconds = (float)Stopwatch.GetElapsedTime(a.Ticks, b.Ticks).TotalMilliseconds;
            return Results.Success;
        }
    }

    [UnmanagedCallersOnly]
    private static int GetErrorName(int result, byte** name) => SetText(name, Results.Name(result));

    /// <summary>For errors that a finding caused: the finding's report.</summary>
    [UnmanagedCallersOnly]
    private static int GetErrorString(int result, byte** text) => SetText(text,
        Gpu.Fault is { } fault && result == Results.Of(fault.Check) ? fault.ToString()
            : Gpu.LastError);

    private static int SetText(byte** to, string text)
    {
        // The newest two texts stay alive: a caller reads name and explanation together.
        Marshal.FreeCoTaskMem((nint)s_older);
        s_older = s_text;
        s_text = (byte*)Marshal.StringToCoTaskMemUTF8(text);
        *to = s_text;
        return Results.Success;
    }

    private static byte* s_older;

    private static int Set(int* to, int value)
    {
        *to = value;
        return Results.Success;
    }

    private static int With(nint handle, Func<EmulatedGpu, EmulatedStream, int> run,
        [CallerMemberName] string call = "")
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Fault != null) return Results.Of(gpu.Fault.Check);
            if (gpu.Stream(handle) is not { } stream) return Results.InvalidHandle;
            gpu.LastError = $"{call} refused its arguments";
            return run(gpu, stream);
        }
    }
}
