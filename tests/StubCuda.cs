using System.Reflection;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Tests;

/// <summary>
/// A driver, an NVRTC and a cuBLAS that succeed and compute next to nothing, so that a whole
/// training goes through them in a second, and that fail on request: <see cref="CountingCuda"/>'s
/// tables, with memory that is there, copies, fill_real and products. One at a time.
/// </summary>
internal sealed unsafe class StubCuda
{
    // Beside the image of a module, which nobody reads.
    private static readonly List<string> s_functions = [];
    private static int s_code, s_room;
    private static nint s_name, s_text;

    public StubCuda()
    {
        s_room = int.MaxValue;
        CudaApi counting = CountingCuda.Context(new("Stub", 4, 80, 2L << 30)).Api;
        Driver = counting.Driver;
        Driver.MemAlloc = &Allocate;
        Driver.MemFree = &Free;
        Driver.MemHostAlloc = &HostAllocate;
        Driver.MemFreeHost = &HostFree;
        Driver.MemcpyHtoDAsync = &Upload;
        Driver.MemcpyDtoHAsync = &Download;
        Driver.MemcpyDtoDAsync = &Copy;
        Driver.MemsetD8Async = &Fill;
        Driver.MemsetD32Async = &FillWords;
        Driver.ModuleGetFunction = &Function;
        Driver.LaunchKernel = &Launch;
        Driver.GetErrorName = &ErrorName;
        Driver.GetErrorString = &ErrorText;
        Cublas = counting.Cublas;
        Cublas.GemmEx = &Gemm;
        Nvrtc = new NvrtcApi
        {
            Version = &Version,
            CreateProgram = &CreateProgram,
            CompileProgram = &CompileProgram,
            DestroyProgram = &DestroyProgram,
            GetPtxSize = &Size,
            GetPtx = &Image,
            GetLogSize = &Size,
            GetLog = &Image,
            GetErrorString = &CompilerText,
            GetNumSupportedArchs = &Count,
            GetSupportedArchs = &Architectures,
        };
        Devices = new DeviceSource { Cuda = () => new(Driver, Nvrtc, Cublas), Cache = null };
    }

    /// <summary>Allocations that fit before the GPU is full.</summary>
    public int Room { init => s_room = value; }

    public CudaDriverApi Driver { get; }

    public CublasApi Cublas { get; }

    public NvrtcApi Nvrtc { get; }

    public DeviceSource Devices { get; init; }

    /// <summary>The calls of a table, by their names in it.</summary>
    public static IEnumerable<string> Calls(object table) =>
        table.GetType().GetFields().Where(field => field.FieldType.IsFunctionPointer)
            .Select(field => field.Name);

    /// <summary>Lets one call of a table fail from now on, whatever its arguments.</summary>
    public static void Break(object table, string call, int code, string name = "CUDA_ERROR_STUB")
    {
        s_code = code;
        s_name = Marshal.StringToCoTaskMemUTF8(name);
        s_text = Marshal.StringToCoTaskMemUTF8("as the test asks");
        // The arguments of a C function are its caller's to clean up.
        delegate* unmanaged<int> fail = &Fail;
        FieldInfo field = table.GetType().GetField(call)!;
        field.SetValue(table, (nint)fail);
    }

    [UnmanagedCallersOnly] private static int Fail() => s_code;

    [UnmanagedCallersOnly]
    private static int ErrorName(int code, byte** text)
    {
        *text = (byte*)s_name;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int ErrorText(int code, byte** text)
    {
        *text = (byte*)s_text;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Allocate(ulong* address, nuint bytes)
    {
        const int outOfMemory = 2;
        if (s_room-- == 0) return outOfMemory;
        *address = (ulong)NativeMemory.AlignedAlloc(bytes, 256);
        NativeMemory.Clear((void*)*address, Math.Min(bytes, 16 << 20));
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Free(ulong address)
    {
        NativeMemory.AlignedFree((void*)address);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int HostAllocate(void** pointer, nuint bytes, uint flags)
    {
        *pointer = NativeMemory.AllocZeroed(bytes);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int HostFree(void* pointer)
    {
        NativeMemory.Free(pointer);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Upload(ulong to, void* from, nuint bytes, nint stream)
    {
        NativeMemory.Copy(from, (void*)to, bytes);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Download(void* to, ulong from, nuint bytes, nint stream)
    {
        NativeMemory.Copy((void*)from, to, bytes);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Copy(ulong to, ulong from, nuint bytes, nint stream)
    {
        NativeMemory.Copy((void*)from, (void*)to, bytes);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Fill(ulong to, byte value, nuint bytes, nint stream)
    {
        NativeMemory.Fill((void*)to, bytes, value);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int FillWords(ulong to, uint value, nuint count, nint stream)
    {
        new Span<uint>((void*)to, (int)count).Fill(value);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Function(nint* function, nint module, byte* name)
    {
        s_functions.Add(Marshal.PtrToStringUTF8((nint)name)!);
        *function = s_functions.Count;
        return 0;
    }

    // Nothing but what a device shows when it is opened.
    [UnmanagedCallersOnly]
    private static int Launch(
        nint function, uint gx, uint gy, uint gz, uint bx, uint by, uint bz, uint shared,
        nint stream, void** arguments, void** extra)
    {
        if (s_functions[(int)function - 1] != "fill_real") return 0;
        byte* packed = (byte*)extra[1];
        float* to = *(float**)packed;
        new Span<float>(to, (int)*(long*)(packed + 16)).Fill(*(float*)(packed + 8));
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Gemm(
        nint handle, int transA, int transB, int m, int n, int k, void* alpha, ulong a, int typeA,
        int lda, ulong b, int typeB, int ldb, void* beta, ulong c, int typeC, int ldc, int compute,
        int algorithm)
    {
        if (m != 8 || n != 8 || k != 8) return 0;
        for (int i = 0; i < 64; i++) ((float*)c)[i] = 0;
        for (int col = 0; col < 8; col++)
            for (int row = 0; row < 8; row++)
                for (int i = 0; i < 8; i++)
                    ((float*)c)[(col * ldc) + row] +=
                        ((float*)a)[(i * lda) + row] * ((float*)b)[(col * ldb) + i];
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Version(int* major, int* minor)
    {
        (*major, *minor) = (12, 0);
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int CreateProgram(
        nint* program, byte* text, byte* name, int count, byte** headers, byte** names)
    {
        *program = 1;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int CompileProgram(nint program, int count, byte** options) => 0;

    [UnmanagedCallersOnly] private static int DestroyProgram(nint* program) => 0;

    [UnmanagedCallersOnly]
    private static int Size(nint program, nuint* bytes)
    {
        *bytes = 4;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Image(nint program, byte* to)
    {
        "ptx\0"u8.CopyTo(new Span<byte>(to, 4));
        return 0;
    }

    [UnmanagedCallersOnly] private static byte* CompilerText(int code) => (byte*)s_text;

    [UnmanagedCallersOnly]
    private static int Count(int* count)
    {
        *count = 1;
        return 0;
    }

    [UnmanagedCallersOnly]
    private static int Architectures(int* to)
    {
        *to = 80;
        return 0;
    }
}
