using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>Memory: allocations, and copies that run late, when their stream's turn
/// comes.</summary>
internal static unsafe partial class DriverEntryPoints
{
    [UnmanagedCallersOnly]
    private static int MemGetInfo(nuint* free, nuint* total)
    {
        *total = (nuint)Gpu.Memory.Capacity;
        *free = (nuint)(Gpu.Memory.Capacity - Gpu.Memory.Used);
        return Results.Success;
    }

    [UnmanagedCallersOnly]
    private static int MemAlloc(ulong* address, nuint bytes)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (bytes == 0) return Results.InvalidValue;
            var allocation = gpu.Memory.Allocate((long)bytes, $"an allocation of {bytes} bytes");
            if (allocation == null) return Results.OutOfMemory;
            *address = allocation.Start;
            return Results.Success;
        }
    }

    /// <summary>Frees after all queued work, as the real call does.</summary>
    [UnmanagedCallersOnly]
    private static int MemFree(ulong address)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            int result = Drain(gpu);
            if (result != Results.Success) return result;
            return address == 0 || gpu.Memory.Free(address) ? Results.Success
                : Results.InvalidValue;
        }
    }

    [UnmanagedCallersOnly]
    private static int MemHostAlloc(void** pointer, nuint bytes, uint flags)
    {
        const uint DeviceMap = 2;
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (flags == DeviceMap)
            {
                // Only kernels and copies use it, under an address that the host cannot follow.
                var allocation =
                    gpu.Memory.Allocate((long)bytes, $"{bytes} bytes of the host's memory");
                if (allocation == null) return Results.OutOfMemory;
                *pointer = (void*)allocation.Start;
                return Results.Success;
            }

            *pointer = NativeMemory.AlignedAlloc(bytes, 4096);
            gpu.Pinned.Add((nint)(*pointer));
            return Results.Success;
        }
    }

    [UnmanagedCallersOnly]
    private static int MemFreeHost(void* pointer)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            int result = Drain(gpu);
            if (gpu.Pinned.Remove((nint)pointer)) NativeMemory.AlignedFree(pointer);
            else if (!gpu.Memory.Free((ulong)pointer)) return Results.InvalidValue;
            return result;
        }
    }

    [UnmanagedCallersOnly]
    private static int MemcpyHtoDAsync(ulong to, void* from, nuint bytes, nint handle) =>
        Enqueue(handle, "cuMemcpyHtoDAsync", gpu =>
        {
            if (gpu.Memory.Find((ulong)from) is not null)
            {
                Copy(gpu, to, (ulong)from, bytes, "cuMemcpyHtoDAsync");
                return;
            }

            var target = Range(gpu, to, bytes, "cuMemcpyHtoDAsync");
            Buffer.MemoryCopy(from, target.Host, bytes, bytes);
            new Span<byte>(target.State, (int)bytes).Fill(255);
        });

    [UnmanagedCallersOnly]
    private static int MemcpyDtoHAsync(void* to, ulong from, nuint bytes, nint handle) =>
        Enqueue(handle, "cuMemcpyDtoHAsync", gpu =>
        {
            if (gpu.Memory.Find((ulong)to) is not null)
            {
                Copy(gpu, (ulong)to, from, bytes, "cuMemcpyDtoHAsync");
                return;
            }

            var source = Range(gpu, from, bytes, "cuMemcpyDtoHAsync");
            int unwritten = new Span<byte>(source.State, (int)bytes).IndexOfAnyExcept((byte)255);
            if (unwritten >= 0)
                throw new FaultException(new(Check.Uninitialised,
                    $"byte {unwritten} of {bytes} at 0x{from:x} was never written",
                    "cuMemcpyDtoHAsync"));
            Buffer.MemoryCopy(source.Host, to, bytes, bytes);
        });

    [UnmanagedCallersOnly]
    private static int MemcpyDtoDAsync(ulong to, ulong from, nuint bytes, nint handle) =>
        Enqueue(handle, "cuMemcpyDtoDAsync",
            gpu => Copy(gpu, to, from, bytes, "cuMemcpyDtoDAsync"));

    // Between memory that kernels use, some of which may be the host's.
    private static void Copy(EmulatedGpu gpu, ulong to, ulong from, nuint bytes, string call)
    {
        var source = Range(gpu, from, bytes, call);
        var target = Range(gpu, to, bytes, call);
        Buffer.MemoryCopy(source.Host, target.Host, bytes, bytes);
        Buffer.MemoryCopy(source.State, target.State, bytes, bytes);
    }

    [UnmanagedCallersOnly]
    private static int MemsetD8Async(ulong to, byte value, nuint bytes, nint handle) =>
        Enqueue(handle, "cuMemsetD8Async", gpu =>
        {
            var target = Range(gpu, to, bytes, "cuMemsetD8Async");
            new Span<byte>(target.Host, (int)bytes).Fill(value);
            new Span<byte>(target.State, (int)bytes).Fill(255);
        });

    [UnmanagedCallersOnly]
    private static int MemsetD32Async(ulong to, uint value, nuint count, nint handle) =>
        to % 4 != 0 ? Results.InvalidValue : Enqueue(handle, "cuMemsetD32Async", gpu =>
        {
            var target = Range(gpu, to, count * 4, "cuMemsetD32Async");
            new Span<uint>(target.Host, (int)count).Fill(value);
            new Span<byte>(target.State, (int)count * 4).Fill(255);
        });

    private readonly struct HostRange(nint host, nint state)
    {
        public byte* Host => (byte*)host;
        public byte* State => (byte*)state;
    }

    // The host bytes of a device range; checked when the copy runs, since memory may be freed
    // before.
    private static HostRange Range(EmulatedGpu gpu, ulong address, nuint bytes, string call)
    {
        if (gpu.Memory.Refusal(address, (long)bytes) is { } refusal)
            throw new FaultException(new(refusal.Check, refusal.Detail, call));
        var allocation = gpu.Memory.Find(address)!;
        ulong offset = address - allocation.Start;
        return new((nint)(allocation.Host + offset), (nint)(allocation.State + offset));
    }

    private static int Enqueue(nint handle, string call, Action<EmulatedGpu> work) =>
        With(handle, (gpu, stream) =>
        {
            stream.Work.Enqueue((null, () => work(gpu)));
            return Results.Success;
        }, call);
}
