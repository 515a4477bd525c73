namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The 256 colours of an indexed GIF, BMP or TGA, from palettes of any length. As in Pillow a
/// palette in which every colour is its own number in grey counts as grey, and goes on as such;
/// behind any other one everything is black.
/// </summary>
internal sealed class ColourTable
{
    private readonly byte[] _rgb = new byte[256 * 3];

    private ColourTable()
    {
    }

    /// <summary>Value i is grey of level i.</summary>
    public static ColourTable Grey { get; } = MakeGrey();

    public ReadOnlySpan<byte> this[int value] => _rgb.AsSpan(value * 3, 3);

    /// <summary>Colour i has its first channel at i * step and the others behind it; blue comes
    /// first in BMP and TGA.</summary>
    public static ColourTable Read(ReadOnlySpan<byte> palette, int step, bool blueFirst)
    {
        var table = new ColourTable();
        int colours = Math.Min(256, palette.Length / step);
        for (int i = 0; i < colours; i++)
        {
            var colour = palette.Slice(i * step, 3);
            var (r, g, b) = blueFirst
                ? (colour[2], colour[1], colour[0]) : (colour[0], colour[1], colour[2]);
            (table._rgb[i * 3], table._rgb[(i * 3) + 1], table._rgb[(i * 3) + 2]) = (r, g, b);
        }

        return table._rgb.AsSpan(0, colours * 3)
            .SequenceEqual(Grey._rgb.AsSpan(0, colours * 3)) ? Grey : table;
    }

    private static ColourTable MakeGrey()
    {
        var table = new ColourTable();
        for (int i = 0; i < 256; i++) table._rgb.AsSpan(i * 3, 3).Fill((byte)i);
        return table;
    }
}
