using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>One pass over a PNG: the whole picture, or one of Adam7's seven lattices.</summary>
internal readonly record struct PngPass(int X, int Y, int StepX, int StepY, int Columns, int Rows)
{
    private static ReadOnlySpan<byte> Adam7 =>
        [0, 0, 8, 8, 4, 0, 8, 8, 0, 4, 4, 8, 2, 0, 4, 4, 0, 2, 2, 4, 1, 0, 2, 2, 0, 1, 1, 2];

    public bool Interlaced => StepY > 1 || StepX > 1 || Y > 0;

    /// <summary>The passes that have pixels, in the order of the file.</summary>
    public static List<PngPass> All(PngHeader header)
    {
        int width = (int)header.Width, height = (int)header.Height;
        if (!header.Interlaced) return [new(0, 0, 1, 1, width, height)];
        var passes = new List<PngPass>(7);
        for (int i = 0; i < 28; i += 4)
        {
            var (x, y, dx, dy) = (Adam7[i], Adam7[i + 1], Adam7[i + 2], Adam7[i + 3]);
            var pass = new PngPass(x, y, dx, dy, (width - x + dx - 1) / dx,
                (height - y + dy - 1) / dy);
            if (pass is { Columns: > 0, Rows: > 0 }) passes.Add(pass);
        }

        return passes;
    }
}

/// <summary>Unfiltered PNG rows of any colour type and depth into the RGB picture.</summary>
internal sealed class PngRows
{
    private readonly int _depth, _colour;

    // RGB of every value of a palette, or of grey of up to 8 bits.
    private readonly byte[] _colours = new byte[256 * 3];
    private byte[] _line = [];

    public PngRows(PngHeader header, ByteSource source)
    {
        (_depth, _colour) = (header.Depth, header.Colour);
        int scale = _colour == 0 && _depth < 8 ? 255 / ((1 << _depth) - 1) : 1;
        if (_colour == 3)
        {
            // Values beyond a short palette are black, as in Pillow.
            source.At(header.PaletteAt, header.PaletteLength / 3 * 3).CopyTo(_colours);
            return;
        }

        for (int i = 0; i < 256; i++) _colours.AsSpan(i * 3, 3).Fill((byte)(i * scale));
    }

    /// <summary>Sets the picture from a row on to what sample value 0 means.</summary>
    public void Clear(Picture picture, int fromRow)
    {
        var rest = picture.Rgb[(fromRow * picture.Stride)..];
        if (_colour != 3)
        {
            rest.Clear();
            return;
        }

        for (int i = 0; i < rest.Length; i += 3) _colours.AsSpan(0, 3).CopyTo(rest[i..]);
    }

    /// <summary>Row y of a pass to its place in the picture.</summary>
    public void Write(ReadOnlySpan<byte> row, Picture picture, PngPass pass, int y)
    {
        var target = picture.Row(pass.Y + (y * pass.StepY));
        if (pass.StepX == 1)
        {
            Widen(row, target);
            return;
        }

        int length = pass.Columns * 3;
        if (_line.Length < length) _line = new byte[length];
        Widen(row, _line.AsSpan(0, length));
        int step = pass.StepX * 3;
        for (int i = 0, x = pass.X * 3; i < length; i += 3, x += step)
            _line.AsSpan(i, 3).CopyTo(target[x..]);
    }

    private void Widen(ReadOnlySpan<byte> row, Span<byte> rgb)
    {
        switch (_colour, _depth)
        {
            case (2, 8): row.CopyTo(rgb); break;
            case (2, 16): Pick(row, rgb, 6, 0, 2, 4); break;
            case (6, 8): DropAlpha(row, rgb); break;
            case (6, 16): Pick(row, rgb, 8, 0, 2, 4); break;
            case (4, 8): Pick(row, rgb, 2, 0, 0, 0); break;
            case (4, 16): Pick(row, rgb, 4, 0, 0, 0); break;
            case (0, 16): ClipGrey(row, rgb); break;
            case (_, 8): Look(row, rgb); break;
            default: LookPacked(row, rgb); break;
        }
    }

    private static void Pick(ReadOnlySpan<byte> row, Span<byte> rgb, int step, int r, int g, int b)
    {
        for (int i = 0, p = 0; i < rgb.Length; i += 3, p += step)
            (rgb[i], rgb[i + 1], rgb[i + 2]) = (row[p + r], row[p + g], row[p + b]);
    }

    // Four bytes at a time: the fourth is overwritten by the next pixel.
    private static void DropAlpha(ReadOnlySpan<byte> row, Span<byte> rgb)
    {
        int pixels = rgb.Length / 3;
        ref byte from = ref MemoryMarshal.GetReference(row);
        ref byte to = ref MemoryMarshal.GetReference(rgb);
        for (int x = 0; x < pixels - 1; x++)
        {
            uint pixel = Unsafe.ReadUnaligned<uint>(ref Unsafe.Add(ref from, x * 4));
            Unsafe.WriteUnaligned(ref Unsafe.Add(ref to, x * 3), pixel);
        }

        row.Slice((pixels - 1) * 4, 3).CopyTo(rgb[((pixels - 1) * 3)..]);
    }

    private static void ClipGrey(ReadOnlySpan<byte> row, Span<byte> rgb)
    {
        for (int i = 0, p = 0; i < rgb.Length; i += 3, p += 2)
            rgb.Slice(i, 3).Fill(row[p] != 0 ? (byte)255 : row[p + 1]);
    }

    private void Look(ReadOnlySpan<byte> row, Span<byte> rgb)
    {
        ReadOnlySpan<byte> colours = _colours;
        for (int i = 0, p = 0; i < rgb.Length; i += 3, p++)
            colours.Slice(row[p] * 3, 3).CopyTo(rgb[i..]);
    }

    private void LookPacked(ReadOnlySpan<byte> row, Span<byte> rgb)
    {
        ReadOnlySpan<byte> colours = _colours;
        int mask = (1 << _depth) - 1;
        for (int i = 0, bit = 0; i < rgb.Length; i += 3, bit += _depth)
        {
            int value = (row[bit >> 3] >> (8 - _depth - (bit & 7))) & mask;
            colours.Slice(value * 3, 3).CopyTo(rgb[i..]);
        }
    }
}
