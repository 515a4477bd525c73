namespace MiniCpmNative.Engine;

/// <summary>Files the user names, opened with every refusal turned into one line.</summary>
public static class InputFile
{
    /// <summary>Opens a file for reading.</summary>
    /// <exception cref="InputException">
    /// Missing, a directory, unreadable, or not of that size.
    /// </exception>
    public static FileStream Open(
        string path, long leastBytes = 0, long mostBytes = long.MaxValue, int buffer = 4096)
    {
        if (Directory.Exists(path))
            throw new InputException($"{path}: is a directory, expected a file");
        try
        {
            // Asked before opening: opening a pipe, whose length is 0, would wait for its writer.
            Check(path, new FileInfo(path).Length, leastBytes, mostBytes);
            var stream =
                new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, buffer);
            try
            {
                Check(path, stream.Length, leastBytes, mostBytes);
                return stream;
            }
            catch
            {
                stream.Dispose();
                throw;
            }
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException
            or ArgumentException or NotSupportedException)
        {
            throw Unreadable(path, failure);
        }
    }

    /// <summary>All bytes of a file; a pipe counts as empty.</summary>
    /// <exception cref="InputException">As <see cref="Open"/>.</exception>
    public static byte[] ReadAll(string path, long mostBytes)
    {
        if (File.Exists(path) && new FileInfo(path).Length == 0) return [];
        using var stream = Open(path, mostBytes: Math.Min(mostBytes, Array.MaxLength), buffer: 0);
        var bytes = new byte[stream.Length];
        try
        {
            stream.ReadExactly(bytes);
        }
        catch (IOException failure)
        {
            throw Unreadable(path, failure);
        }

        return bytes;
    }

    private static void Check(string path, long bytes, long least, long most)
    {
        if (bytes < least)
            throw new InputException($"{path}: has {bytes:N0} bytes, expected at least {least:N0}");
        if (bytes > most)
            throw new InputException($"{path}: has {bytes:N0} bytes, expected at most {most:N0}");
    }

    private static InputException Unreadable(string path, Exception failure) =>
        new(failure is FileNotFoundException or DirectoryNotFoundException
            ? $"{path}: there is no such file"
            : $"{path}: cannot read: {Messages.OneLine(failure.Message)}", failure);
}
