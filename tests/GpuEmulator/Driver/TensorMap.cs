using System.Runtime.InteropServices;

namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>
/// The 128 bytes of a CUtensorMap, in a layout of the emulator's own: the driver's is opaque.
/// Tiled maps without interleaving, of elements side by side, zeros outside.
/// </summary>
[StructLayout(LayoutKind.Sequential, Size = 128)]
internal unsafe struct TensorMap
{
    private const ulong Mark = 0x70616D726F736E74;

    private ulong _mark;
    public ulong Address;
    public fixed ulong Sizes[5];
    public fixed ulong Strides[5];
    public fixed ushort Box[5];
    public byte Rank, ElementBytes, SwizzleBytes;

    public readonly bool IsValid => _mark == Mark;

    // CUtensorMapDataType: U8, U16, U32, S32, U64, S64, F16, F32, F64, BF16, F32 flushed, TF32,
    // TF32 flushed.
    private static ReadOnlySpan<byte> Bytes => [1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4];

    /// <summary>cuTensorMapEncodeTiled: the map, or CUDA_ERROR_INVALID_VALUE for what the driver
    /// documents as wrong. Strides are those of all dimensions but the first, in bytes; swizzle is
    /// 0, or 1 to 3 for 32, 64 and 128 bytes.</summary>
    public static int EncodeTiled(out TensorMap map, int type, ulong address, ulong[] sizes,
        ulong[] strides, uint[] box, uint[] elementStrides, int interleave, int swizzle, int fill)
    {
        map = default;
        int rank = sizes.Length;
        if (type < 0 || type >= Bytes.Length || rank is < 1 or > 5 || address % 16 != 0
            || strides.Length != rank - 1 || box.Length != rank || elementStrides.Length != rank
            || interleave != 0 || swizzle is < 0 or > 3 || fill != 0)
            return Results.InvalidValue;
        map._mark = Mark;
        map.Address = address;
        map.Rank = (byte)rank;
        map.ElementBytes = Bytes[type];
        map.SwizzleBytes = (byte)(swizzle == 0 ? 0 : 16 << swizzle);
        map.Strides[0] = map.ElementBytes;
        for (int n = 0; n < rank; n++)
        {
            if (sizes[n] is 0 or > 1ul << 32 || box[n] is 0 or > 256 || elementStrides[n] != 1)
                return Results.InvalidValue;
            if (n > 0 && (strides[n - 1] % 16 != 0 || strides[n - 1] >= 1ul << 40))
                return Results.InvalidValue;
            map.Sizes[n] = sizes[n];
            map.Box[n] = (ushort)box[n];
            if (n > 0) map.Strides[n] = strides[n - 1];
        }
        int row = map.Box[0] * map.ElementBytes;
        return row % 16 != 0 || (swizzle != 0 && row > map.SwizzleBytes) ? Results.InvalidValue
            : Results.Success;
    }
}
