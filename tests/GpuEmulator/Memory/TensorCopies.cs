using System.Numerics;
using MiniCpmNative.GpuEmulator.Driver;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// cp.async.bulk.tensor, tiled: a box of a tensor as rows of shared memory, the first dimension
/// innermost, XORed by the map's swizzle. Elements outside the tensor come as zeros and are not
/// stored.
/// </summary>
internal static unsafe class TensorCopies
{
    /// <summary>Map at [A], coordinates in Rows, shared memory at [D]; Mode as for bulk
    /// copies.</summary>
    public static void Issue(Warp w, Instruction i)
    {
        Address.Fill(w, i.D, i.DWidth == 8, i.Mode2);
        var shared = new ulong[32];
        new ReadOnlySpan<ulong>(w.Addresses, 32).CopyTo(shared);
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            var map = Read(w, i, w.Addresses[lane], lane);
            if (map.Rank != i.Rows.Length)
                throw w.Fault(Check.Descriptor, lane,
                    $"{i.Rows.Length} coordinates, the tensor map has {map.Rank} dimensions");
            ulong at = Address.ToShared(shared[lane]);
            if (at % 128 != 0)
                throw w.Fault(Check.Misaligned, lane,
                    $"shared 0x{at:x}: copies of tensors need 128 bytes");
            BulkCopies.Begin(w, i, lane, Pieces(w, i, map, at, lane), i.Mode == 2, i.Mode == 1);
        }
    }

    private static TensorMap Read(Warp w, Instruction i, ulong address, int lane)
    {
        if (address % 64 != 0)
            throw w.Fault(Check.Misaligned, lane, $"a tensor map at 0x{address:x}: 64 bytes");
        TensorMap map;
        ulong parameter = address - DeviceMemory.ParamWindow;
        byte[] arguments = w.Block.Launch.Arguments;
        if (parameter < DeviceMemory.WindowBytes)
        {
            if (parameter + 128 > (ulong)arguments.Length)
                throw w.Fault(Check.OutOfBounds, lane,
                    $"a tensor map at {parameter} of {arguments.Length} bytes of arguments");
            fixed (byte* from = arguments) map = *(TensorMap*)(from + parameter);
        }
        else map = *(TensorMap*)GlobalAccess.Check(w, i, address, 128, lane);
        return map.IsValid ? map
            : throw w.Fault(Check.Descriptor, lane,
                $"no tensor map at 0x{address:x}: cuTensorMapEncodeTiled makes one");
    }

    private static BulkPiece[] Pieces(Warp w, Instruction i, in TensorMap map, ulong at, int lane)
    {
        int size = map.ElementBytes, perPiece = 16 / size, row = map.Box[0] / perPiece, rows = 1;
        for (int n = 1; n < map.Rank; n++) rows *= map.Box[n];
        var pieces = new BulkPiece[rows * row];
        ulong xor = map.SwizzleBytes == 0 ? 0 : (ulong)map.SwizzleBytes / 16 - 1;
        for (int r = 0; r < rows; r++)
        {
            bool inside = true;
            long offset = 0;
            for (int n = 1, left = r; n < map.Rank; n++)
            {
                long index = Coordinate(n) + left % map.Box[n];
                left /= map.Box[n];
                inside &= index >= 0 && index < (long)map.Sizes[n];
                offset += index * (long)map.Strides[n];
            }
            for (int c = 0; c < row; c++)
            {
                ulong place = at + (ulong)(r * row + c) * 16;
                place ^= (place >> 7 & xor) << 4;
                long first = Coordinate(0) + c * perPiece, from = Math.Max(first, 0),
                    end = Math.Min(first + perPiece, (long)map.Sizes[0]);
                pieces[r * row + c] = !inside || end <= from
                    ? new(place, 0, 0, 0)
                    : new(place, map.Address + (ulong)(offset + from * size),
                        (int)(from - first) * size, (int)(end - from) * size);
            }
        }
        return pieces;

        long Coordinate(int n) => ((int*)(w.R + i.Rows[n]))[lane];
    }
}
