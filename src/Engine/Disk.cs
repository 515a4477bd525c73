using System.Runtime.InteropServices;

namespace MiniCpmNative.Engine;

/// <summary>A change that <see cref="Disk"/> made.</summary>
/// <param name="Kind">What was done.</param>
/// <param name="Path">To which file or folder.</param>
/// <param name="To">The new name of what was renamed.</param>
internal readonly record struct DiskChange(DiskChangeKind Kind, string Path, string? To = null);

internal enum DiskChangeKind
{
    FileWritten, FolderMade, Renamed, Removed, FolderFlushed,
}

/// <summary>
/// Changes of folders that outlive a loss of power in the order in which they must: a file system
/// may keep any of them and lose those before it until the folder is flushed. A file's content is
/// flushed by who writes it (<see cref="AtomicFile"/>).
/// </summary>
internal static class Disk
{
    // EBADF, EINVAL and the "not supported" of Linux and macOS: file systems that cannot flush a
    // folder.
    private static readonly int[] s_cannotFlush = [9, 22, 45, 95];

    /// <summary>Is told of the changes that this flow of control makes; tests set it.</summary>
    public static AsyncLocal<Action<DiskChange>?> Watch { get; } = new();

    /// <summary>Tells of a file that was written and flushed.</summary>
    public static void Written(string path) => Tell(new(DiskChangeKind.FileWritten, path));

    public static void MakeFolder(string path)
    {
        Directory.CreateDirectory(path);
        Tell(new(DiskChangeKind.FolderMade, path));
    }

    /// <summary>Renames a file over another, or a folder.</summary>
    public static void Rename(string path, string to)
    {
        if (Directory.Exists(path)) Directory.Move(path, to);
        else File.Move(path, to, overwrite: true);
        Tell(new(DiskChangeKind.Renamed, path, to));
    }

    /// <summary>Removes a file, if it is there, or a folder with all that is in it.</summary>
    public static void Remove(string path)
    {
        if (new FileInfo(path).LinkTarget is null && Directory.Exists(path))
        {
            foreach (string file in Directory.GetFiles(path)) Remove(file);
            Directory.Delete(path, recursive: true);
        }
        else if (Directory.Exists(path)) Directory.Delete(path);
        else File.Delete(path);
        Tell(new(DiskChangeKind.Removed, path));
    }

    /// <summary>Returns when the names in a folder are on the disk.</summary>
    /// <exception cref="IOException">They cannot be written.</exception>
    public static void Flush(string folder)
    {
        if (!OperatingSystem.IsWindows())
        {
            int file = Open(folder, 0);
            int error = file < 0 ? Marshal.GetLastPInvokeError() : 0;
            if (file >= 0)
            {
                if (Synchronise(file) != 0) error = Marshal.GetLastPInvokeError();
                _ = Close(file);
            }

            if (error != 0 && !s_cannotFlush.Contains(error))
                throw new IOException(
                    $"{folder}: {Marshal.GetPInvokeErrorMessage(error)}");
        }

        Tell(new(DiskChangeKind.FolderFlushed, folder));
    }

    private static void Tell(in DiskChange change) => Watch.Value?.Invoke(change);

    [DllImport("libc", EntryPoint = "open", SetLastError = true)]
    private static extern int Open([MarshalAs(UnmanagedType.LPUTF8Str)] string path, int flags);

    [DllImport("libc", EntryPoint = "fsync", SetLastError = true)]
    private static extern int Synchronise(int file);

    [DllImport("libc", EntryPoint = "close")]
    private static extern int Close(int file);
}
