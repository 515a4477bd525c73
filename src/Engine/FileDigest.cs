using System.Security.Cryptography;
using Microsoft.Win32.SafeHandles;

namespace MiniCpmNative.Engine;

/// <summary>
/// Tells files apart: SHA-256 of the length and of all bytes, or, above 64 MiB, of 1,024 pieces of
/// 16 KiB from the first byte to the last, evenly apart. Weights of another run, step or model
/// differ everywhere, and files that were flushed and renamed are whole: reading the pieces is
/// enough, and takes no time beside writing a checkpoint.
/// </summary>
internal static class FileDigest
{
    private const long WholeBytes = 64 << 20;
    private const int Pieces = 1024, PieceBytes = 16 << 10;

    /// <exception cref="IOException">The file cannot be read.</exception>
    /// <exception cref="UnauthorizedAccessException">The same.</exception>
    public static string Of(string path)
    {
        using SafeFileHandle file = File.OpenHandle(path);
        return Of(file);
    }

    /// <inheritdoc cref="Of(string)"/>
    public static string Of(SafeFileHandle file)
    {
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        long length = RandomAccess.GetLength(file);
        hash.AppendData(BitConverter.GetBytes(length));
        bool whole = length <= WholeBytes;
        var piece = new byte[whole ? 1 << 20 : PieceBytes];
        long count = whole ? (length + piece.Length - 1) / piece.Length : Pieces;
        for (long i = 0; i < count; i++)
        {
            long at = whole ? i * piece.Length : (length - PieceBytes) * i / (Pieces - 1);
            Span<byte> left = piece.AsSpan(0, (int)Math.Min(piece.Length, length - at));
            while (left.Length > 0)
            {
                int read = RandomAccess.Read(file, left, at);
                if (read == 0) break;
                hash.AppendData(left[..read]);
                left = left[read..];
                at += read;
            }
        }

        return Convert.ToHexStringLower(hash.GetHashAndReset());
    }
}
