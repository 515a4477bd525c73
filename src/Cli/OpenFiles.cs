using System.Runtime.InteropServices;

namespace MiniCpmNative.Cli;

/// <summary>
/// The limit of open files. Below some sixty not even the parts of this program can be opened, and
/// the runtime ends it with a stack of its own, so it is looked at before anything else.
/// </summary>
internal static partial class OpenFiles
{
    private const ulong Fewest = 128;

    /// <summary>A line where the limit is too low, else null.</summary>
    public static string? Refusal()
    {
        bool isMac = OperatingSystem.IsMacOS();
        if (!isMac && !OperatingSystem.IsLinux()) return null;
        return GetLimit(isMac ? 8 : 7, out Limit files) == 0 && files.Soft < Fewest
            ? $"cpmx: only {files.Soft} files may be open at a time (ulimit -n), {Fewest} are "
                + "needed"
            : null;
    }

    [LibraryImport("libc", EntryPoint = "getrlimit")]
    private static partial int GetLimit(int resource, out Limit limit);

    private struct Limit
    {
        public ulong Soft, Hard;
    }
}
