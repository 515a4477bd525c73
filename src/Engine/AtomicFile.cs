using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine;

/// <summary>
/// Files that are there whole or not at all: written under a temporary name in the same directory,
/// flushed to the disk, then renamed over the old one. A failed write leaves the old file as it
/// was; a killed one leaves its temporary file, which is locked while its writer lives.
/// </summary>
public static partial class AtomicFile
{
    private const int BufferBytes = 1 << 20;

    /// <exception cref="RunException">
    /// The file cannot be written; names it and the system's reason.
    /// </exception>
    public static void Write(string path, Action<Stream> content)
    {
        string temporary = $"{path}.{Environment.ProcessId}.tmp";
        try
        {
            using (var stream = new FileStream(
                temporary, FileMode.Create, FileAccess.Write, FileShare.None, BufferBytes))
            {
                content(stream);
                stream.Flush(flushToDisk: true);
                Disk.Written(temporary);
                // Before it is closed, and with it unlocked.
                Disk.Rename(temporary, path);
            }

            Disk.Flush(Path.GetDirectoryName(Path.GetFullPath(path))!);
        }
        catch (Exception failure)
        {
            try
            {
                File.Delete(temporary);
            }
            catch (Exception ignored) when (ignored is IOException or UnauthorizedAccessException)
            {
                // The first failure says more than that its left-over could not be removed.
            }

            if (failure is not (IOException or UnauthorizedAccessException)) throw;
            string reason = Messages.OneLine(failure.Message.Replace(temporary, path));
            throw new RunException($"{path}: cannot write: {reason}", failure);
        }
    }

    /// <summary>Writes text as UTF-8 without a byte-order mark.</summary>
    /// <exception cref="RunException">The file cannot be written.</exception>
    public static void WriteText(string path, string text) =>
        Write(path, stream => stream.Write(System.Text.Encoding.UTF8.GetBytes(text)));

    /// <summary>
    /// Removes what killed writers left in a folder, of the files that <paramref name="isOurs"/>
    /// knows by their final name; a living writer's file stays.
    /// </summary>
    public static void RemoveLeftovers(string folder, Func<string, bool> isOurs)
    {
        foreach (string path in Directory.EnumerateFiles(folder, "*.tmp"))
        {
            Match match = Temporary().Match(Path.GetFileName(path));
            // Neither a pipe, which would wait, nor a link.
            if (!match.Success || !isOurs(match.Groups[1].Value)
                || new FileInfo(path) is not { LinkTarget: null }) continue;
            try
            {
                using var stream = new FileStream(
                    path, FileMode.Open, FileAccess.ReadWrite, FileShare.None);
                File.Delete(path);
            }
            catch (Exception living) when (living is IOException or UnauthorizedAccessException)
            {
                // Its writer holds the lock, or it is another user's.
            }
        }
    }

    [GeneratedRegex(@"^(.+)\.\d+\.tmp$")]
    private static partial Regex Temporary();
}
