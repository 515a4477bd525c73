namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// WebP through libwebp; of an animation the first frame on a black canvas. Alpha is dropped, the
/// colours under it stay as stored, as Pillow's convert("RGB") has it, or it is laid over white.
/// </summary>
internal static unsafe class WebPDecoder
{
    // Lossy: the prediction modes of a block of 16x16 pixels take more than 3 bits.
    private const long LossyPixelsPerByte = 256 * 8 / 2;

    private static readonly NativePictureLibrary s_library = new(
        "WebP",
        "libwebp",
        "Debian or Ubuntu: apt install libwebp7 (libwebp6 in older ones); Fedora: dnf install "
            + "libwebp; macOS: brew install webp",
        [
            "libwebp.so.7", "libwebp.so.6", "libwebp.so", "libwebp.dylib", "libwebp.dll",
            "webp.dll",
            "/opt/homebrew/opt/webp/lib/libwebp.dylib", "/usr/local/opt/webp/lib/libwebp.dylib",
        ]);

    /// <summary>Whether the library is there.</summary>
    public static string Describe() => s_library.Describe();

    /// <exception cref="InputException">The library is missing, or the file is damaged.</exception>
    public static Picture Decode(
        ByteSource source, byte[] file, WebPHeader header, bool overWhite = false)
    {
        long pixels = (long)header.Width * header.Height;
        if (!header.Lossless && !header.Animated
            && pixels > (source.Length * LossyPixelsPerByte) + 65536)
            throw source.Error(
                $"damaged WebP: {header.Width}x{header.Height} pixels do not fit into "
                + $"{source.Length} bytes");
        nint info = s_library.Entry("WebPGetInfo", source);
        nint decode = s_library.Entry(
            overWhite ? "WebPDecodeRGBAInto" : "WebPDecodeRGBInto", source);
        int start = header.Animated ? (int)header.DataAt : 0;
        var data = file.AsSpan(start, (int)header.DataLength);
        fixed (byte* bytes = data)
        {
            int width, height;
            int known = ((delegate* unmanaged[Cdecl]<byte*, nuint, int*, int*, int>)info)(
                bytes, (nuint)data.Length, &width, &height);
            if (known == 0 || new PictureSize(width, height) != header.Frame)
                throw source.Error("damaged WebP: the picture's header is damaged");
            var picture = new Picture(header.Width, header.Height);
            if (header.Frame != picture.Size) picture.Rgb.Clear();
            var (x, y) = (header.FrameOffset.Width, header.FrameOffset.Height);
            int stride = overWhite ? 4 * picture.Width : picture.Stride;
            byte[] alphas = overWhite ? new byte[(long)stride * picture.Height] : [];
            Span<byte> target = overWhite ? alphas.AsSpan((y * stride) + (x * 4))
                : picture.Rgb[((y * stride) + (x * 3))..];
            fixed (byte* into = target)
            {
                var done = (
                    (delegate* unmanaged[Cdecl]<byte*, nuint, byte*, nuint, int, byte*>)decode)(
                    bytes, (nuint)data.Length, into, (nuint)target.Length, stride);
                if (done != null && overWhite) White.Lay(alphas, picture.Rgb);
                if (done != null) return picture;
            }

            picture.Dispose();
            throw source.Error("damaged WebP: its pixels are cut off or damaged");
        }
    }
}
