using System.Globalization;

namespace MiniCpmNative.GpuEmulator.Ptx;

/// <summary>Number literals: decimal, 0x, 0 (octal), 0b, U suffix, 0f and 0d bit patterns,
/// decimals.</summary>
internal static class Literal
{
    /// <summary>The bits of the literal for a value of that many bytes; null when it is
    /// none.</summary>
    public static ulong? Bits(string text, int bytes, bool isFloat)
    {
        if (text.Length == 0 || !char.IsAsciiDigit(text[0])) return null;
        if (text.Length == 10 && text[..2] is "0f" or "0F")
            return uint.TryParse(text.AsSpan(2), NumberStyles.HexNumber, null, out uint f)
                ? bytes == 8 && isFloat
                ? BitConverter.DoubleToUInt64Bits(BitConverter.UInt32BitsToSingle(f)) : f
                : null;
        if (text.Length == 18 && text[..2] is "0d" or "0D")
            return ulong.TryParse(text.AsSpan(2), NumberStyles.HexNumber, null, out ulong d)
                ? bytes == 4 && isFloat
                ? BitConverter.SingleToUInt32Bits((float)BitConverter.UInt64BitsToDouble(d)) : d
                : null;
        if (text.Contains('.')
            && double.TryParse(text, CultureInfo.InvariantCulture, out double value))
            return bytes == 8
                ? BitConverter.DoubleToUInt64Bits(value)
                : BitConverter.SingleToUInt32Bits((float)value);
        string digits = text.TrimEnd('U');
        if (digits.StartsWith("0x", StringComparison.OrdinalIgnoreCase))
            return ulong.TryParse(digits.AsSpan(2), NumberStyles.HexNumber, null, out ulong hex)
                ? hex : null;
        if (digits.StartsWith("0b", StringComparison.OrdinalIgnoreCase))
            return ulong.TryParse(digits.AsSpan(2), NumberStyles.BinaryNumber, null, out ulong bin)
                ? bin : null;
        return ulong.TryParse(digits, CultureInfo.InvariantCulture, out ulong integer) ? integer
            : null;
    }
}
