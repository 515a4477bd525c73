using StbImageSharp;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// Pixels through StbImageSharp, a managed library that needs nothing installed. What it gets was
/// looked through before: it has no limits of its own, takes zeros for what a file lacks, and
/// leaves memory as it was where a file says nothing.
/// </summary>
internal static class StbDecoder
{
    /// <summary>
    /// Pixels that it is given at most: with its buffers, and copies of the result, up to
    /// BytesPerPixel are in memory at once.
    /// </summary>
    public const long MaxPixels = 1 << 26;

    public const int BytesPerPixel = 16;

    /// <summary>RGB pixels.</summary>
    /// <exception cref="InputException">The data is damaged or cut off, or the picture is too large
    /// for the library.</exception>
    public static Picture Decode(
        ByteSource source, string format, PictureStream stream, PictureSize size)
    {
        if ((long)size.Width * size.Height > MaxPixels)
            throw source.Error(
                $"{format} of {size.Width}x{size.Height} pixels, the built-in decoder takes "
                + $"{MaxPixels}; scale it down or convert it to PNG");
        ImageResult result;
        try
        {
            result = ImageResult.FromStream(stream, ColorComponents.RedGreenBlue);
        }
        catch (InvalidOperationException e)
        {
            string reason = string.IsNullOrWhiteSpace(e.Message) ? "" : $" ({e.Message.Trim()})";
            throw source.Error($"damaged {format}: its pixels cannot be decoded{reason}", e);
        }

        if (stream.Exhausted) throw source.Error($"damaged {format}: its pixels are cut off");
        if (result.Width != size.Width || result.Height != size.Height)
            throw source.Error($"damaged {format}: the picture's header is damaged");
        var picture = new Picture(size.Width, size.Height);
        result.Data.CopyTo(picture.Rgb);
        return picture;
    }
}
