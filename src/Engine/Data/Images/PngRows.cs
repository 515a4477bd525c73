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
    private readonly bool _overWhite;

    // The colour that is transparent; empty where none is.
    private readonly byte[] _key = [];

    // RGB of every value of a palette, or of grey of up to 8 bits.
    private readonly byte[] _colours = new byte[256 * 3];
    private byte[] _line = [];

    /// <param name="header">The file's.</param>
    /// <param name="source">The file.</param>
    /// <param name="overWhite">Lays what is transparent over white in place of dropping
    /// alpha.</param>
    public PngRows(PngHeader header, ByteSource source, bool overWhite = false)
    {
        (_depth, _colour, _overWhite) = (header.Depth, header.Colour, overWhite);
        ReadOnlySpan<byte> clear = overWhite
            ? source.At(header.TransparencyAt, header.TransparencyLength) : [];
        // Samples of the key have 16 bits, of which 8 count.
        if (_depth == 8 && _colour == 0 && clear.Length >= 2) _key = [clear[1], clear[1], clear[1]];
        if (_depth == 8 && _colour == 2 && clear.Length >= 6) _key = [clear[1], clear[3], clear[5]];
        int scale = _colour == 0 && _depth < 8 ? 255 / ((1 << _depth) - 1) : 1;
        if (_colour == 3)
        {
            // Values beyond a short palette are black, as in Pillow.
            byte[] alphas = clear.ToArray();
            source.At(header.PaletteAt, header.PaletteLength / 3 * 3).CopyTo(_colours);
            for (int i = 0; i < 3 * alphas.Length; i++)
                _colours[i] = White.Under(_colours[i], alphas[i / 3]);
            return;
        }

        for (int i = 0; i < 256; i++) _colours.AsSpan(i * 3, 3).Fill((byte)(i * scale));
    }

    /// <summary>Whether one colour is transparent, so that rows have to be looked at.</summary>
    public bool HasKey => _key.Length > 0;

    /// <summary>Sets the picture from a row on to what sample value 0 means.</summary>
    public void Clear(Picture picture, int fromRow)
    {
        var rest = picture.Rgb[(fromRow * picture.Stride)..];
        if (_colour != 3)
        {
            rest.Fill((byte)(_overWhite && _colour is 4 or 6 ? 255 : 0));
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
        int bytes = _depth / 8;
        if (_overWhite && _colour is 4 or 6)
        {
            int channels = _colour == 4 ? 1 : 3, step = (channels + 1) * bytes;
            for (int i = 0; i < rgb.Length; i++)
            {
                ReadOnlySpan<byte> pixel = row.Slice(i / 3 * step, step);
                rgb[i] = White.Under(pixel[i % 3 % channels * bytes], pixel[channels * bytes]);
            }

            return;
        }

        Colours(row, rgb);
        if (!HasKey) return;
        for (int i = 0; i < rgb.Length; i += 3)
            if (rgb.Slice(i, 3).SequenceEqual(_key)) rgb.Slice(i, 3).Fill(255);
    }

    private void Colours(ReadOnlySpan<byte> row, Span<byte> rgb)
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

/// <summary>White under what is transparent.</summary>
internal static class White
{
    /// <summary>Pixels with alpha over white; what nothing was put into is transparent.</summary>
    public static void Lay(ReadOnlySpan<byte> rgba, Span<byte> rgb)
    {
        for (int i = 0; i < rgb.Length; i++)
            rgb[i] = Under(rgba[(i / 3 * 4) + (i % 3)], rgba[(i / 3 * 4) + 3]);
    }

    /// <summary>A channel's value over white, as Pillow composes it.</summary>
    public static byte Under(int value, int alpha)
    {
        if (alpha == 0) return 255;
        int part = 128 * alpha;
        int sum = (value * part) + (255 * ((255 * 128) - part)) + (128 << 7);
        return (byte)((((sum >> 8) + sum) >> 8) >> 7);
    }
}
