using System.Buffers.Binary;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Shared libraries looked at before the system's loader maps them: one that was cut ends the
/// process there. Layout: System V ABI, ELF-64, little-endian.
/// </summary>
internal static class ElfFile
{
    private const int HeaderBytes = 64, SegmentBytes = 56, Loaded = 1;

    /// <summary>What is wrong with a file, in words behind its name; null if nothing is.</summary>
    public static string? Fault(string path)
    {
        if (!OperatingSystem.IsLinux()) return null;
        try
        {
            // A pipe would wait for a writer.
            long bytes = new FileInfo(File.ResolveLinkTarget(path, true)?.FullName ?? path).Length;
            if (bytes < HeaderBytes) return $"has {bytes:N0} bytes, which is no shared library";
            using var file = File.OpenHandle(path);
            Span<byte> header = stackalloc byte[HeaderBytes],
                segment = stackalloc byte[SegmentBytes];
            RandomAccess.Read(file, header, 0);
            if (!header.StartsWith("\u007fELF\u0002\u0001"u8)) return "is no shared library";
            long at = BinaryPrimitives.ReadInt64LittleEndian(header[32..]);
            int size = BinaryPrimitives.ReadUInt16LittleEndian(header[54..]);
            int count = BinaryPrimitives.ReadUInt16LittleEndian(header[56..]);
            if (size != SegmentBytes || count == 0 || at < 0 || at > bytes - ((long)size * count))
                return $"has {bytes:N0} bytes and no table of segments: it was cut or is damaged";
            for (int i = 0; i < count; i++, at += size)
            {
                RandomAccess.Read(file, segment, at);
                if (BinaryPrimitives.ReadInt32LittleEndian(segment) != Loaded) continue;
                ulong from = BinaryPrimitives.ReadUInt64LittleEndian(segment[8..]);
                ulong length = BinaryPrimitives.ReadUInt64LittleEndian(segment[32..]);
                if (from > (ulong)bytes || length > (ulong)bytes - from)
                    return $"has {bytes:N0} bytes, its segments need {from + length:N0}: it was "
                        + "cut";
            }

            return null;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return $"cannot be read: {failure.Message.ReplaceLineEndings(" ")}";
        }
    }

    /// <summary>The file that the system's loader will probably take for a name, or null.</summary>
    public static string? OfSystem(string name, Func<string, string?> environment)
    {
        if (!OperatingSystem.IsLinux()) return null;
        string[] own = (environment("LD_LIBRARY_PATH") ?? "").Split(
            ':', StringSplitOptions.RemoveEmptyEntries);
        return own.Concat(["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu",
                "/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64",
                "/lib", "/usr/lib"])
            .Select(folder => Path.Combine(folder, name)).FirstOrDefault(File.Exists);
    }
}
