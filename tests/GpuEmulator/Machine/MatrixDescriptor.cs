using MiniCpmNative.GpuEmulator.Memory;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>
/// A matrix in shared memory as wgmma's 64-bit descriptor gives it (PTX ISA, "Matrix Descriptor
/// Format" and "Canonical Layouts"), in pieces of 16 bytes: eight bf16 along the major dimension.
/// With R the bytes of a swizzle row (16 without swizzling), piece c of row r lies at
/// K-major:  r % 8 * R + r / 8 * stride + c * 16 (without swizzling c * leading);
/// MN-major: piece c of the row of k at k % 8 * R + k / 8 * stride + c % (R / 16) * 16
/// + c / (R / 16) * leading (without swizzling the two strides change places).
/// Then address bits 4 and up are XORed with bits 7 and up: Swizzle(B, 4, 3).
/// </summary>
internal readonly struct MatrixDescriptor
{
    private readonly int _start, _leading, _stride, _row, _xor;

    private MatrixDescriptor(ulong bits, int row, int xor)
    {
        _start = (int)(bits & 0x3FFF) << 4;
        _leading = (int)(bits >> 16 & 0x3FFF) << 4;
        _stride = (int)(bits >> 32 & 0x3FFF) << 4;
        (_row, _xor) = (row, xor);
    }

    /// <exception cref="FaultException">The descriptor cannot be followed.</exception>
    public static MatrixDescriptor Read(Warp w, ulong bits, char operand)
    {
        var (row, xor) = (bits >> 62) switch
        {
            0 => (16, 0),
            1 => (128, 7),
            2 => (64, 3),
            _ => (32, 1),
        };
        if ((bits & 0x3FF1_C000_C000_C000) != 0)
            throw w.Fault(Check.Descriptor, 0,
                $"descriptor 0x{bits:x} of {operand} has bits set that must be 0");
        if ((bits >> 49 & 7) != 0)
            throw w.Fault(Check.Descriptor, 0,
                $"descriptor 0x{bits:x} of {operand} has a base offset: not modelled, align the " +
                $"tile to {row * 8} bytes");
        var d = new MatrixDescriptor(bits, row, xor);
        if ((d._start >> 7 & xor) != 0)
            throw w.Fault(Check.Misaligned, 0,
                $"{operand} starts at shared address 0x{d._start:x}, its swizzle of {row} bytes " +
                $"repeats every {row * 8} bytes: align it to that");
        return d;
    }

    /// <summary>Shared address of piece c (0 or 1) of row r of a K-major matrix.</summary>
    public int OfRow(int r, int c) => Swizzle(_start + r % 8 * _row + r / 8 * _stride
        + c * (_xor == 0 ? _leading : 16));

    /// <summary>Shared address of piece c (8 rows or columns) at depth k, MN-major.</summary>
    public int OfDepth(int k, int c) => _xor == 0
        ? _start + k % 8 * 16 + k / 8 * _leading + c * _stride
        : Swizzle(_start + k % 8 * _row + k / 8 * _stride + c % (_row / 16) * 16
            + c / (_row / 16) * _leading);

    private int Swizzle(int address) => address ^ (address >> 7 & _xor) << 4;
}
