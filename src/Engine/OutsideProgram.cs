using System.ComponentModel;
using System.Diagnostics;

namespace MiniCpmNative.Engine;

/// <summary>Programs of others that decode what is not read here: ffmpeg and ffprobe.</summary>
internal static class OutsideProgram
{
    /// <summary>What a program writes, given all of its input.</summary>
    /// <param name="program">Its name or path.</param>
    /// <param name="name">Its name in messages.</param>
    /// <param name="arguments">What it is called with.</param>
    /// <param name="input">What it reads.</param>
    /// <param name="file">What is decoded, in messages.</param>
    /// <param name="missing">What is said of the file where there is no such program.</param>
    /// <param name="mostSeconds">How long it may take; null as long as it likes.</param>
    /// <exception cref="InputException">It is not there, or ended with a message.</exception>
    public static MemoryStream Run(string program, string name, IEnumerable<string> arguments,
        byte[] input, string file, string missing, int? mostSeconds = null)
    {
        var start = new ProcessStartInfo(program, arguments)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        try
        {
            using Process process = Process.Start(start)!;
            bool late = false;
            using var clock = mostSeconds is { } seconds ? new Timer(_ => { late = true; process.Kill(); },
                null, TimeSpan.FromSeconds(seconds), Timeout.InfiniteTimeSpan) : null;
            Task<string> said = process.StandardError.ReadToEndAsync();
            Task feeds = Task.Run(() => Feed(process, input));
            var output = new MemoryStream();
            process.StandardOutput.BaseStream.CopyTo(output);
            process.WaitForExit();
            feeds.Wait();
            if (late)
                throw new InputException(
                    $"{file}: {name} needs more than {mostSeconds} seconds for it: shorten it");
            return process.ExitCode == 0 ? output : throw new InputException(
                $"{file}: {name} cannot decode it: {Messages.OneLine(said.Result.Trim())}");
        }
        catch (Win32Exception)
        {
            throw new InputException($"{file}: {missing}");
        }
    }

    // It may end before it has read all, with a message.
    private static void Feed(Process process, byte[] input)
    {
        try
        {
            process.StandardInput.BaseStream.Write(input);
            process.StandardInput.Close();
        }
        catch (IOException)
        {
        }
    }
}
