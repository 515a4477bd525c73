using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Security.Cryptography;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Compiled modules on disk, one file each, in a folder that its owner alone may enter. What it
/// holds runs on the GPU, so files and folders of others are not used, nor what is no regular file;
/// one that is cut or altered is found by its own hash. A cache that cannot be used is done
/// without: compiling again is the whole cost.
/// </summary>
internal sealed class ModuleCache(string folder)
{
    // Several types, devices and versions; older ones go.
    private const int MostFiles = 24;
    private const int HeaderBytes = 4 + 8 + 32;
    private const long MostBytes = 256 << 20;
    private const UnixFileMode OwnersAlone =
        UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;

    // Longer than a module takes to be written.
    private static readonly TimeSpan s_unfinished = TimeSpan.FromHours(1);
    private static readonly byte[] s_magic = "cpmk"u8.ToArray();

    /// <summary>A module, or null. In the file: magic, length, SHA-256 of the image, it.</summary>
    public byte[]? Read(string name)
    {
        string file = Path.Combine(folder, name);
        try
        {
            if (!Directory.Exists(folder) || !IsOurs(folder) || !IsOurs(file)) return null;
            // A pipe has no length, and opening it would wait.
            var info = new FileInfo(file);
            if (info.LinkTarget is not null || info.Length is < HeaderBytes or > MostBytes)
                return null;
            byte[] bytes = File.ReadAllBytes(file);
            if (bytes.Length < HeaderBytes || !bytes.AsSpan(0, 4).SequenceEqual(s_magic))
                return null;
            long length = BinaryPrimitives.ReadInt64LittleEndian(bytes.AsSpan(4));
            if (length != bytes.Length - HeaderBytes)
                return null;
            byte[] image = bytes[HeaderBytes..];
            if (!SHA256.HashData(image).AsSpan().SequenceEqual(bytes.AsSpan(12, 32))) return null;
            // What is used is young.
            File.SetLastWriteTimeUtc(file, DateTime.UtcNow);
            return image;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Keeps a module, if that is possible.</summary>
    public void Write(string name, byte[] image)
    {
        string file = Path.Combine(folder, name);
        string temporary = $"{file}.{Environment.ProcessId}.{Guid.NewGuid():N}";
        try
        {
            if (OperatingSystem.IsWindows()) Directory.CreateDirectory(folder);
            else
            {
                Directory.CreateDirectory(folder, OwnersAlone);
                if (!IsOurs(folder)) return;
                File.SetUnixFileMode(folder, OwnersAlone);
            }

            var bytes = new byte[HeaderBytes + image.Length];
            s_magic.CopyTo(bytes, 0);
            BinaryPrimitives.WriteInt64LittleEndian(bytes.AsSpan(4), image.Length);
            SHA256.HashData(image).CopyTo(bytes, 12);
            image.CopyTo(bytes, HeaderBytes);
            Clean();
            File.WriteAllBytes(temporary, bytes);
            File.Move(temporary, file, overwrite: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            Remove(temporary);
        }
    }

    // Modules that were not used for the longest time, and what killed writers left.
    private void Clean()
    {
        var modules = new List<FileInfo>();
        foreach (FileInfo file in new DirectoryInfo(folder).EnumerateFiles())
        {
            // HASH.ptx or HASH.cubin, or one of them with what makes a temporary name.
            string[] parts = file.Name.Split('.');
            if (parts.Length < 2 || parts[0].Length != 64 || parts[1] is not ("ptx" or "cubin"))
                continue;
            if (parts.Length == 2) modules.Add(file);
            else if (DateTime.UtcNow - file.LastWriteTimeUtc > s_unfinished) Remove(file.FullName);
        }

        foreach (FileInfo old in modules.OrderByDescending(m => m.LastWriteTimeUtc)
            .Skip(MostFiles - 1)) Remove(old.FullName);
    }

    private static void Remove(string file)
    {
        try
        {
            File.Delete(file);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // Of no use, but no harm either.
        }
    }

    // struct statx of Linux: the owner at byte 20, whatever the processor.
    private static unsafe bool IsOurs(string path)
    {
        if (!OperatingSystem.IsLinux()) return true;
        const int here = -100, noFollow = 0x100, owner = 8, ownerAt = 20;
        byte* found = stackalloc byte[256];
        try
        {
            return Statx(here, path, noFollow, owner, found) == 0
                && *(uint*)(found + ownerAt) == EffectiveUser();
        }
        catch (EntryPointNotFoundException)
        {
            return false;
        }
    }

    [DllImport("libc", EntryPoint = "statx")]
    private static extern unsafe int Statx(
        int folder, [MarshalAs(UnmanagedType.LPUTF8Str)] string path, int flags, uint mask,
        byte* into);

    [DllImport("libc", EntryPoint = "geteuid")]
    private static extern uint EffectiveUser();
}
