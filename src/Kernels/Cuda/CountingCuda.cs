using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>What of a GPU decides which kernels run and how much memory they take.</summary>
/// <param name="Architecture">10 * major + minor.</param>
/// <param name="Memory">Bytes.</param>
public sealed record CardFigures(string Name, int Multiprocessors, int Architecture, long Memory)
{
    /// <summary>Shared memory that a block can opt into: of such cards, where none says
    /// it.</summary>
    public int SharedBytes { get; init; } = Architecture switch
    {
        90 or 100 or 103 => 227 << 10,
        80 or 87 => 163 << 10,
        _ => 99 << 10,
    };

    /// <summary>Whether it runs kernels_sm90a.cu, where activations are in 16 bits.</summary>
    public bool Hopper { get; init; } = CudaKernels.TakesHopper(
        DType.BF16, Architecture, int.MaxValue, CudaKernels.Wish);
}

/// <summary>
/// CUDA tables whose calls succeed and do nothing, on any machine: the device above them goes
/// through the same allocations and launches as on the card whose figures it has, so that what a
/// run will take is counted rather than estimated. Numbers that come back are zeros.
/// </summary>
public static unsafe class CountingCuda
{
    private static readonly Lock s_gate = new();
    // No address of the host is as high.
    private const ulong FirstAddress = 1UL << 56;

    private static ulong s_next = FirstAddress;
    private static nint s_host;
    private static CardFigures s_card = new("", 0, 0, 0);

    /// <summary>A context of such a card.</summary>
    public static CudaContext Context(CardFigures card)
    {
        // The tables are static: the card is there while the context asks for it.
        lock (s_gate)
        {
            s_card = card;
            return new CudaContext(new(Driver(), new(), Cublas()));
        }
    }

    /// <summary>A device for a type of activations with every kernel that the card runs.</summary>
    /// <param name="context">Of such a card.</param>
    /// <param name="activations">BF16 or F32.</param>
    /// <param name="hopper">As the card has it.</param>
    /// <param name="stepBytes">Size of the step's memory.</param>
    public static CudaDevice Device(
        CudaContext context, DType activations, bool hopper = false, long stepBytes = 1L << 46)
    {
        CudaModule all = CudaModule.LoadPtx(context, [0], CudaKernels.Source, activations);
        return new(context, activations, stepBytes,
            !hopper || activations == DType.F32 ? new CudaKernels(all)
            : new(all, CudaModule.LoadPtx(context, [0], CudaKernels.HopperSource, activations)));
    }

    private static CudaDriverApi Driver() => new()
    {
        Init = &One,
        DriverGetVersion = &Version,
        DeviceGetCount = &Version,
        DeviceGet = &Index,
        DeviceGetName = &Name,
        DeviceGetAttribute = &Attribute,
        DevicePrimaryCtxRetain = &Context,
        DevicePrimaryCtxRelease = &Release,
        CtxSetCurrent = &Handle,
        CtxSynchronize = &None,
        MemGetInfo = &Info,
        MemAlloc = &Allocate,
        MemFree = &Free,
        MemHostAlloc = &HostAllocate,
        MemFreeHost = &HostFree,
        MemcpyHtoDAsync = &Upload,
        MemcpyDtoHAsync = &Download,
        MemcpyDtoDAsync = &Copy,
        MemsetD8Async = &Fill,
        MemsetD32Async = &FillWords,
        StreamCreate = &Create,
        StreamDestroy = &Handle,
        StreamSynchronize = &Handle,
        StreamWaitEvent = &Wait,
        EventCreate = &Create,
        EventDestroy = &Handle,
        EventRecord = &Record,
        EventSynchronize = &Handle,
        EventQuery = &Handle,
        ModuleLoadDataEx = &Load,
        ModuleUnload = &Handle,
        ModuleGetFunction = &Function,
        FuncSetAttribute = &SetAttribute,
        LaunchKernel = &Launch,
    };

    private static CublasApi Cublas() => new()
    {
        Create = &CreateHandle,
        Destroy = &Handle,
        GetVersion = &HandleVersion,
        SetStream = &Record,
        SetWorkspace = &Workspace,
        SetMathMode = &MathMode,
        GemmEx = &Gemm,
    };

    [UnmanagedCallersOnly] private static int None() => 0;

    [UnmanagedCallersOnly] private static int One(uint flags) => 0;

    [UnmanagedCallersOnly] private static int Handle(nint handle) => 0;

    [UnmanagedCallersOnly] private static int Record(nint a, nint b) => 0;

    [UnmanagedCallersOnly] private static int Wait(nint a, nint b, uint flags) => 0;

    [UnmanagedCallersOnly]
    private static int Version(int* value)
    {
        *value = 12000;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int HandleVersion(nint handle, int* value)
    {
        *value = 120000;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Index(int* device, int ordinal)
    {
        *device = ordinal;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Name(byte* name, int length, int device)
    {
        int count = System.Text.Encoding.UTF8.GetBytes(
            s_card.Name, new Span<byte>(name, length - 1));
        name[count] = 0;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Attribute(int* value, int attribute, int device)
    {
        *value = attribute switch
        {
            75 => s_card.Architecture / 10,
            76 => s_card.Architecture % 10,
            16 => s_card.Multiprocessors,
            _ => s_card.SharedBytes,
        };
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Context(nint* context, int device)
    {
        *context = 1;
        return 0;
    }

    [UnmanagedCallersOnly] private static int Release(int device) => 0;

    [UnmanagedCallersOnly]
    private static int Info(nuint* free, nuint* total)
    {
        *free = *total = (nuint)s_card.Memory;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Allocate(ulong* address, nuint bytes)
    {
        *address = s_next;
        s_next += ((ulong)bytes + 511) / 256 * 256;
        return 0;
    }

    [UnmanagedCallersOnly] private static int Free(ulong address) => 0;

    [UnmanagedCallersOnly]
    private static int HostAllocate(void** pointer, nuint bytes, uint flags)
    {
        // What only kernels use is never touched.
        if (flags != PinnedMemory.DeviceMap) *pointer = NativeMemory.AllocZeroed(bytes);
        else
        {
            *pointer = (void*)s_next;
            s_next += ((ulong)bytes + 511) / 256 * 256;
        }

        return 0;
    }

    [UnmanagedCallersOnly]
    private static int HostFree(void* pointer)
    {
        if ((ulong)pointer < FirstAddress) NativeMemory.Free(pointer);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Upload(ulong to, void* from, nuint bytes, nint stream) => 0;

    [UnmanagedCallersOnly]
    private static int Download(void* to, ulong from, nuint bytes, nint stream)
    {
        if ((ulong)to < FirstAddress) NativeMemory.Clear(to, bytes);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Copy(ulong to, ulong from, nuint bytes, nint stream) => 0;

    [UnmanagedCallersOnly]
    private static int Fill(ulong to, byte value, nuint bytes, nint stream) => 0;

    [UnmanagedCallersOnly]
    private static int FillWords(ulong to, uint value, nuint bytes, nint stream) => 0;

    [UnmanagedCallersOnly]
    private static int Create(nint* handle, uint flags)
    {
        *handle = ++s_host;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int CreateHandle(nint* handle)
    {
        *handle = ++s_host;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Load(nint* module, void* image, uint count, int* names, void** values)
    {
        *module = ++s_host;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Function(nint* function, nint module, byte* name)
    {
        *function = ++s_host;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int SetAttribute(nint function, int attribute, int value) => 0;

    [UnmanagedCallersOnly]
    private static int Launch(
        nint function, uint gx, uint gy, uint gz, uint bx, uint by, uint bz, uint shared,
        nint stream, void** arguments, void** extra) => 0;

    [UnmanagedCallersOnly] private static int MathMode(nint handle, int mode) => 0;

    [UnmanagedCallersOnly]
    private static int Workspace(nint handle, ulong address, nuint bytes) => 0;

    [UnmanagedCallersOnly]
    private static int Gemm(
        nint handle, int transA, int transB, int m, int n, int k, void* alpha, ulong a, int typeA,
        int lda, ulong b, int typeB, int ldb, void* beta, ulong c, int typeC, int ldc, int compute,
        int algorithm) => 0;

}
