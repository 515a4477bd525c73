using System.Runtime.InteropServices;

namespace MiniCpmNative.Engine.Data.Audio;

/// <summary>
/// Sound as the audio encoders take it: one channel of 16,000 samples a second. WAV is read here;
/// what else there is, FLAC and MP3 among it, by ffmpeg where that is installed.
/// </summary>
public static class SoundReader
{
    /// <summary>Samples a second.</summary>
    public const int Rate = 16000;

    // Of a file, and of what it holds: a hostile one must not fill the memory.
    private const long MostBytes = 1L << 27;
    private const int MostSeconds = 1800;

    /// <summary>The samples of a file.</summary>
    /// <exception cref="InputException">It cannot be read.</exception>
    public static float[] Read(string path) => Read(InputFile.ReadAll(path, MostBytes), path);

    /// <summary>The samples of a file's content; name stands in errors.</summary>
    /// <inheritdoc cref="Read(string)"/>
    public static float[] Read(byte[] content, string name, string ffmpeg = "ffmpeg")
    {
        var (samples, rate) = WavFile.Is(content)
            ? WavFile.Read(content, name) : (Decode(content, name, ffmpeg), Rate);
        return samples.Length == 0 ? throw new InputException($"{name}: holds no sound")
            : samples.Length <= (long)MostSeconds * rate ? Resampling.Run(samples, rate, Rate)
            : throw new InputException($"{name}: is longer than {Messages.Number(MostSeconds)} s, "
                + "the most that is read: cut it");
    }

    private static float[] Decode(byte[] content, string name, string ffmpeg)
    {
        string kind = Kind(content) ?? throw new InputException(
            $"{name}: is no sound file that is known, expected WAV, FLAC, MP3, Ogg or M4A");
        string[] arguments = ["-v", "error", "-protocol_whitelist", "pipe", "-i", "pipe:0", "-t",
            $"{MostSeconds + 1}", "-f", "f32le", "-ac", "1", "-ar", $"{Rate}", "pipe:1"];
        MemoryStream output = OutsideProgram.Run(ffmpeg, "ffmpeg", arguments, content, name,
            $"is {kind}, which is read by ffmpeg, and there is none on this machine: install it, "
            + "or convert the file to WAV");
        ReadOnlySpan<byte> bytes = output.GetBuffer().AsSpan(0, (int)output.Length & ~3);
        return MemoryMarshal.Cast<byte, float>(bytes).ToArray();
    }

    private static string? Kind(ReadOnlySpan<byte> file) =>
        file.StartsWith("fLaC"u8) ? "FLAC"
        : file.StartsWith("OggS"u8) ? "Ogg"
        : file.StartsWith("ID3"u8)
            || (file.Length > 1 && file[0] == 0xFF && (file[1] & 0xE6) == 0xE2) ? "MP3"
        : file.Length > 11 && file[4..8].SequenceEqual("ftyp"u8) ? "M4A" : null;
}
