using System.Diagnostics.CodeAnalysis;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>Sizes of a grid or a block.</summary>
public readonly record struct Dim3(int X, int Y = 1, int Z = 1)
{
    public static implicit operator Dim3(int x) => new(x);
}

/// <summary>
/// Arguments of one launch, packed as the kernel's buffer wants them and checked against its
/// signature one by one: count, kind, element type. Lives on the stack; nothing is allocated.
/// </summary>
public unsafe ref struct LaunchArguments
{
    private const int Capacity = 512;
    private readonly CudaKernel _kernel;
    private fixed byte _bytes[Capacity];
    private int _count;

    internal LaunchArguments(CudaKernel kernel) => _kernel = kernel;

    internal readonly int Count => _count;

    /// <summary>A device pointer to elements of a type.</summary>
    [UnscopedRef]
    public ref LaunchArguments Pointer(ulong address, DType type)
    {
        var p = Next(ParameterKind.Pointer, "a pointer");
        if (p.Element is { } element && element != type)
            throw _kernel.Mismatch(_count, $"is a pointer to {element}, got one to {type}");
        return ref Put(address);
    }

    [UnscopedRef]
    public ref LaunchArguments Int(int value)
    {
        Next(ParameterKind.Int32, "an int");
        return ref Put(value);
    }

    [UnscopedRef]
    public ref LaunchArguments Long(long value)
    {
        Next(ParameterKind.Int64, "a 64-bit integer");
        return ref Put(value);
    }

    [UnscopedRef]
    public ref LaunchArguments Float(float value)
    {
        Next(ParameterKind.Float32, "a float");
        return ref Put(value);
    }

    [UnscopedRef]
    public ref LaunchArguments Double(double value)
    {
        Next(ParameterKind.Float64, "a double");
        return ref Put(value);
    }

    /// <summary>An argument of any kind; an absent tensor is a null pointer of any type.</summary>
    public void Add(in KernelArgument argument)
    {
        switch (argument.Kind)
        {
            case ParameterKind.Pointer when argument.Bits == 0:
                Next(ParameterKind.Pointer, "a pointer");
                Put(0UL);
                break;
            case ParameterKind.Pointer:
                Pointer((ulong)argument.Bits, argument.Type);
                break;
            case ParameterKind.Int32:
                Int((int)argument.Bits);
                break;
            case ParameterKind.Int64:
                Long(argument.Bits);
                break;
            case ParameterKind.Float64:
                Double(BitConverter.Int64BitsToDouble(argument.Bits));
                break;
            default:
                Float(BitConverter.Int32BitsToSingle((int)argument.Bits));
                break;
        }
    }

    private readonly KernelParameter Next(ParameterKind kind, string got)
    {
        var parameters = _kernel.Signature.Parameters;
        if (_count >= parameters.Length)
            throw new CudaException(
                $"{_kernel.Name}: takes {parameters.Length} arguments, got more");
        var p = parameters[_count];
        return p.Kind == kind ? p
            : throw _kernel.Mismatch(_count, $"is {Describe(p.Kind)}, got {got}");
    }

    private static string Describe(ParameterKind kind) => kind switch
    {
        ParameterKind.Pointer => "a pointer",
        ParameterKind.Int32 => "an int",
        ParameterKind.Int64 => "a 64-bit integer",
        ParameterKind.Float32 => "a float",
        _ => "a double",
    };

    [UnscopedRef]
    private ref LaunchArguments Put<T>(T value) where T : unmanaged
    {
        fixed (byte* bytes = _bytes)
            Unsafe.WriteUnaligned(bytes + _kernel.Signature.Offsets[_count], value);
        _count++;
        return ref this;
    }

    /// <summary>Queues the kernel.</summary>
    /// <exception cref="CudaException">Arguments are missing, or the driver refuses the
    /// launch.</exception>
    public void Launch(CudaStream stream, Dim3 grid, Dim3 block, int sharedBytes = 0)
    {
        fixed (byte* bytes = _bytes)
            _kernel.Launch(stream, grid, block, sharedBytes, bytes, _count);
    }

    internal static int MaxBytes => Capacity;
}

/// <summary>One kernel of a module.</summary>
public sealed unsafe class CudaKernel
{
    private const int MaxDynamicShared = 8, DefaultDynamicShared = 48 << 10;
    private readonly CudaDriverApi _driver;
    private readonly nint _function;
    private int _sharedLimit = DefaultDynamicShared;

    internal CudaKernel(CudaContext context, nint function, KernelSignature signature)
    {
        (_driver, _function, Signature) = (context.Api.Driver, function, signature);
        if (signature.ArgumentBytes > LaunchArguments.MaxBytes)
            throw new CudaException(
                $"{signature.Name}: {signature.ArgumentBytes} bytes of arguments are too many");
    }

    public KernelSignature Signature { get; }
    public string Name => Signature.Name;

    /// <summary>Starts the arguments of a launch.</summary>
    public LaunchArguments Arguments() => new(this);

    /// <summary>Raises the dynamic shared memory that launches may ask for above 48 KiB.</summary>
    /// <exception cref="CudaException">The device has not that much per block.</exception>
    public void AllowShared(int bytes)
    {
        if (bytes <= _sharedLimit) return;
        _driver.Check(_driver.FuncSetAttribute(_function, MaxDynamicShared, bytes),
            "cuFuncSetAttribute",
            $"{Name}: {bytes} bytes of shared memory");
        _sharedLimit = bytes;
    }

    internal void Launch(CudaStream stream, Dim3 grid, Dim3 block, int sharedBytes, byte* arguments,
        int count)
    {
        if (count != Signature.Parameters.Length)
            throw new CudaException(
                $"{Name}: takes {Signature.Parameters.Length} arguments, got {count}");
        nuint size = (nuint)Signature.ArgumentBytes;
        // CU_LAUNCH_PARAM_BUFFER_POINTER, ..._SIZE, ..._END: the driver checks the size.
        void** extra = stackalloc void*[] { (void*)1, arguments, (void*)2, &size, null };
        int result = _driver.LaunchKernel(_function, (uint)grid.X, (uint)grid.Y, (uint)grid.Z,
            (uint)block.X,
            (uint)block.Y, (uint)block.Z, (uint)sharedBytes, stream.Handle, null, extra);
        if (result != 0)
            _driver.Check(result, "cuLaunchKernel", Describe(grid, block, sharedBytes));
    }

    private string Describe(Dim3 grid, Dim3 block, int sharedBytes) =>
        $"{Name}, grid ({grid.X}, {grid.Y}, {grid.Z}), block ({block.X}, {block.Y}, {block.Z}), " +
        $"{sharedBytes} bytes of shared memory";

    internal CudaException Mismatch(int argument, string what) =>
        new($"{Name}: argument {argument + 1}, {Signature.Parameters[argument].Name}, {what}");
}
