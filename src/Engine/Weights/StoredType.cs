using System.Collections.Frozen;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A safetensors element type: its name in the header, bytes, and the kernels' type if there is
/// one. Order is the place in the format's own list: writers put the tensors of higher types first.
/// </summary>
public sealed record StoredType(string Name, int Size, DType? Kernel, int Order)
{
    private static readonly StoredType[] s_all =
    [
        new("BOOL", 1, DType.U8, 0), new("U8", 1, DType.U8, 1), new("I8", 1, null, 2),
        new("F8_E5M2", 1, null, 3), new("F8_E4M3", 1, null, 4), new("I16", 2, null, 5),
        new("U16", 2, null, 6), new("F16", 2, DType.F16, 7), new("BF16", 2, DType.BF16, 8),
        new("I32", 4, DType.I32, 9), new("U32", 4, null, 10), new("F32", 4, DType.F32, 11),
        new("F64", 8, DType.F64, 12), new("I64", 8, DType.I64, 13), new("U64", 8, null, 14),
    ];

    private static readonly FrozenDictionary<string, StoredType> s_byName =
        s_all.ToFrozenDictionary(type => type.Name, StringComparer.Ordinal);

    public static string Names { get; } = string.Join(", ", s_all.Select(type => type.Name));

    public static StoredType? Find(string name) => s_byName.GetValueOrDefault(name);

    public static StoredType Of(DType type) => s_byName[type.ToString()];
}
