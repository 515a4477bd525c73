using System.Runtime.InteropServices;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The system's libdeflate, which inflates a whole zlib stream about twice as fast as ZLibStream;
/// looked for when the first PNG needs it. Nothing depends on it: where it is missing, ZLibStream
/// does the same.
/// </summary>
internal static unsafe class LibDeflate
{
    private static readonly nint s_library = NativePictureLibrary.Find(
    [
        "libdeflate.so.0", "libdeflate.so", "libdeflate.0.dylib", "libdeflate.dylib",
        "libdeflate.dll", "deflate.dll", "/opt/homebrew/opt/libdeflate/lib/libdeflate.dylib",
        "/usr/local/opt/libdeflate/lib/libdeflate.dylib",
    ]);

    private static readonly nint s_start = Entry("libdeflate_alloc_decompressor");
    private static readonly nint s_inflate = Entry("libdeflate_zlib_decompress_ex");
    private static readonly nint s_stop = Entry("libdeflate_free_decompressor");

    /// <summary>The library was found.</summary>
    public static bool Available => s_start != 0 && s_inflate != 0 && s_stop != 0;

    /// <summary>
    /// Inflates the zlib stream at the start of from into all of into; the bytes it took, or -1
    /// unless it is undamaged, complete with its checksum, and exactly that long.
    /// </summary>
    public static int Inflate(ReadOnlySpan<byte> from, Span<byte> into)
    {
        if (!Available) return -1;
        void* decoder = ((delegate* unmanaged[Cdecl]<void*>)s_start)();
        if (decoder == null) return -1;
        nuint took = 0, made = 0;
        int status;
        var inflate = (delegate* unmanaged[Cdecl]<void*, byte*, nuint, byte*, nuint, nuint*, nuint*,
            int>)s_inflate;
        fixed (byte* source = from, target = into)
            status = inflate(
                decoder, source, (nuint)from.Length, target, (nuint)into.Length, &took, &made);
        ((delegate* unmanaged[Cdecl]<void*, void>)s_stop)(decoder);
        return status == 0 && made == (nuint)into.Length ? (int)took : -1;
    }

    private static nint Entry(string function) =>
        s_library != 0 && NativeLibrary.TryGetExport(s_library, function, out nint address)
            ? address : 0;
}
