namespace MiniCpmNative.Kernels;

/// <summary>
/// Element types of stored tensors. BF16 and F16 are storage types: the CPU computes in F32 (F64
/// only in gradient checks), a GPU in F32 or BF16; F16 is a type of weights in files. Statistics
/// saved for backward are always F32, or F64 in a gradient check.
/// </summary>
public enum DType : byte
{
    F32,
    BF16,
    F16,
    F64,
    I32,
    U8,
    I64,
}

public static class DTypes
{
    /// <summary>Bytes of one element.</summary>
    public static int Size(this DType type) => type switch
    {
        DType.F32 or DType.I32 => 4,
        DType.BF16 or DType.F16 => 2,
        DType.F64 or DType.I64 => 8,
        DType.U8 => 1,
        _ => throw new ArgumentOutOfRangeException(nameof(type), type, "not a dtype"),
    };

    /// <summary>
    /// Type of statistics saved for backward, and of losses, beside activations of a type.
    /// </summary>
    public static DType Statistics(this DType activations) =>
        activations == DType.F64 ? DType.F64 : DType.F32;

    public static bool IsFloat(this DType type) =>
        type is DType.F32 or DType.BF16 or DType.F16 or DType.F64;
}
