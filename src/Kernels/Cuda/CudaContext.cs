using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The primary context of one CUDA device. A thread that makes calls must have it current: call
/// <see cref="MakeCurrent"/> once per thread. Disposing releases the device.
/// </summary>
public sealed unsafe class CudaContext : IDisposable
{
    private readonly nint _context;
    private readonly int _device;

    /// <exception cref="CudaException">The device does not exist or cannot be taken.</exception>
    public CudaContext(CudaApi api, int ordinal = 0)
    {
        Api = api;
        var d = api.Driver;
        int device = 0;
        d.Check(d.DeviceGet(&device, ordinal), "cuDeviceGet", $"device {ordinal}");
        nint context = 0;
        d.Check(d.DevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain",
            $"device {ordinal}");
        (_device, _context) = (device, context);
        MakeCurrent();
        byte* name = stackalloc byte[256];
        d.Check(d.DeviceGetName(name, 256, device), "cuDeviceGetName");
        Name = Marshal.PtrToStringUTF8((nint)name) ?? "";
        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR, MULTIPROCESSOR_COUNT, shared
        // opt-in.
        Architecture = Attribute(75) * 10 + Attribute(76);
        Multiprocessors = Attribute(16);
        MaxSharedBytes = Attribute(97);
        int version = 0;
        d.Check(d.DriverGetVersion(&version), "cuDriverGetVersion");
        DriverVersion = version;
    }

    public CudaApi Api { get; }
    public string Name { get; }

    /// <summary>Compute capability as 10 * major + minor.</summary>
    public int Architecture { get; }
    public int Multiprocessors { get; }

    /// <summary>Shared memory one block can opt into, bytes.</summary>
    public int MaxSharedBytes { get; }

    /// <summary>Whether that is less than the 163 KiB of compute capability 8.0: on 8.6, 8.9 and
    /// 12.0 it is 99.</summary>
    public bool SmallShared => MaxSharedBytes < 160 << 10;

    /// <summary>The driver's CUDA version, 1000 * major + 10 * minor.</summary>
    public int DriverVersion { get; }

    /// <summary>Bytes of device memory that this process holds through it.</summary>
    public long HeldBytes { get; internal set; }

    public void MakeCurrent() =>
        Api.Driver.Check(Api.Driver.CtxSetCurrent(_context), "cuCtxSetCurrent");

    /// <summary>Bytes free and in all.</summary>
    public (long Free, long Total) Memory()
    {
        nuint free = 0, total = 0;
        Api.Driver.Check(Api.Driver.MemGetInfo(&free, &total), "cuMemGetInfo");
        return ((long)free, (long)total);
    }

    /// <summary>Waits for everything; the error of any earlier asynchronous call comes out
    /// here.</summary>
    public void Synchronise() => Api.Driver.Check(Api.Driver.CtxSynchronize(), "cuCtxSynchronize");

    private int Attribute(int attribute)
    {
        int value = 0;
        Api.Driver.Check(Api.Driver.DeviceGetAttribute(&value, attribute, _device),
            "cuDeviceGetAttribute",
            $"attribute {attribute}");
        return value;
    }

    public void Dispose() => Api.Driver.DevicePrimaryCtxRelease(_device);
}
