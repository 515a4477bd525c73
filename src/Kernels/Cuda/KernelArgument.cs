namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// An argument of a launch: what tensors, integers and floats turn into, so that a launch reads
/// like a call. The kernel's signature decides whether it fits.
/// </summary>
public readonly struct KernelArgument
{
    private KernelArgument(ParameterKind kind, long bits, DType type = default) =>
        (Kind, Bits, Type) = (kind, bits, type);

    internal ParameterKind Kind { get; }

    internal long Bits { get; }

    internal DType Type { get; }

    /// <summary>Of a tensor, those of its elements.</summary>
    internal long Bytes { get; init; }

    /// <summary>Its address; null where there is no tensor.</summary>
    public static implicit operator KernelArgument(in Tensor tensor) =>
        new(ParameterKind.Pointer, tensor.Data, tensor.Type)
        {
            Bytes = tensor.Exists ? tensor.Spec.Bytes : 0,
        };

    public static implicit operator KernelArgument(int value) => new(ParameterKind.Int32, value);

    public static implicit operator KernelArgument(uint value) => new(ParameterKind.Int32, value);

    /// <summary>1 or 0.</summary>
    public static implicit operator KernelArgument(bool value) =>
        new(ParameterKind.Int32, value ? 1 : 0);

    public static implicit operator KernelArgument(long value) => new(ParameterKind.Int64, value);

    public static implicit operator KernelArgument(ulong value) =>
        new(ParameterKind.Int64, (long)value);

    /// <summary>A double, for the few kernels that compute in it.</summary>
    public static KernelArgument Double(double value) =>
        new(ParameterKind.Float64, BitConverter.DoubleToInt64Bits(value));

    /// <summary>A float; almost no kernel computes in a wider type.</summary>
    public static implicit operator KernelArgument(double value) =>
        new(ParameterKind.Float32, BitConverter.SingleToInt32Bits((float)value));
}
