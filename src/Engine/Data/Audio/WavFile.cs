using System.Buffers.Binary;

namespace MiniCpmNative.Engine.Data.Audio;

/// <summary>
/// The samples of a RIFF WAVE file: integers of 8 to 32 bits and floats, any number of channels,
/// whose mean is taken. Chunks that are not known are passed over, as are bytes behind the samples.
/// </summary>
internal static class WavFile
{
    private const int Pcm = 1, Float = 3, Extensible = 0xFFFE, LeastRate = 1000, MostRate = 192000;

    // 128 MiB as floats; 11 minutes at 48 kHz.
    private const int MostFrames = 1 << 25;

    /// <summary>Whether a file begins as one does.</summary>
    public static bool Is(ReadOnlySpan<byte> file) =>
        file.Length >= 12 && file[..4].SequenceEqual("RIFF"u8)
        && file[8..12].SequenceEqual("WAVE"u8);

    /// <summary>Samples in -1..1 of one channel, with their rate.</summary>
    /// <exception cref="InputException">Cut, damaged, or of a kind that is not read.</exception>
    public static (float[] Samples, int Rate) Read(ReadOnlySpan<byte> file, string name)
    {
        ReadOnlySpan<byte> format = default;
        for (long at = 12; at + 8 <= file.Length;)
        {
            ReadOnlySpan<byte> head = file.Slice((int)at, 8);
            long length = BinaryPrimitives.ReadUInt32LittleEndian(head[4..]);
            long left = file.Length - at - 8;
            if (head[..4].SequenceEqual("fmt "u8))
            {
                format = file.Slice((int)at + 8, (int)Math.Min(length, left));
            }
            else if (head[..4].SequenceEqual("data"u8))
            {
                // Programs that write into a pipe do not know the length and say none, or the most.
                bool isOpen = length is 0 or >= 0xFFFFFF00;
                if (!isOpen && length > left)
                    throw new InputException($"{name}: is cut: {Messages.Number(length)} bytes of "
                        + $"samples are announced, {Messages.Number(left)} are there");
                return Samples(
                    format, file.Slice((int)at + 8, (int)(isOpen ? left : length)), name);
            }

            at += 8 + length + (length & 1);
        }

        throw new InputException($"{name}: is a WAV file without samples (no data chunk)");
    }

    private static (float[], int) Samples(
        ReadOnlySpan<byte> format, ReadOnlySpan<byte> data, string name)
    {
        if (format.Length < 16)
            throw new InputException($"{name}: has no format (fmt chunk) before its samples");
        int kind = Word(format), channels = Word(format[2..]), bits = Word(format[14..]);
        long rate = BinaryPrimitives.ReadUInt32LittleEndian(format[4..]);
        if (kind == Extensible && format.Length >= 26) kind = Word(format[24..]);
        bool isKnown = kind == Pcm
            ? bits is 8 or 16 or 24 or 32 : kind == Float && bits is 32 or 64;
        if (!isKnown)
            throw new InputException($"{name}: is a WAV file of format {kind} with {bits} bits a "
                + "sample, expected integers of 8, 16, 24 or 32 bits or floats of 32 or 64: "
                + "convert it, for instance by ffmpeg -i IN -c:a pcm_s16le OUT.wav");
        if (channels == 0 || rate is < LeastRate or > MostRate)
            throw new InputException($"{name}: has {channels} channels at {rate} Hz, expected at "
                + $"least one, at {LeastRate} to {MostRate} Hz");
        int size = bits / 8, frame = size * channels, frames = data.Length / frame;
        if (frames > MostFrames)
            throw new InputException($"{name}: has {Messages.Number(frames)} samples a channel, at "
                + $"most {Messages.Number(MostFrames)} are read: cut it, or convert it to 16 kHz");
        var samples = new float[frames];
        for (int i = 0; i < frames; i++)
        {
            double sum = 0;
            for (int c = 0; c < channels; c++)
                sum += Sample(data.Slice((i * frame) + (c * size), size), kind == Float);
            samples[i] = (float)(sum / channels);
            if (!float.IsFinite(samples[i]))
                throw new InputException($"{name}: sample {Messages.Number(i)} is not finite");
        }

        return (samples, (int)rate);
    }

    private static double Sample(ReadOnlySpan<byte> bytes, bool isFloat) => (
        bytes.Length, isFloat) switch
    {
        (1, _) => (bytes[0] - 128) / 128.0,
        (2, _) => BinaryPrimitives.ReadInt16LittleEndian(bytes) / 32768.0,
        (3, _) => ((bytes[0] << 8) | (bytes[1] << 16) | (bytes[2] << 24)) / 2147483648.0,
        (4, false) => BinaryPrimitives.ReadInt32LittleEndian(bytes) / 2147483648.0,
        (4, true) => BinaryPrimitives.ReadSingleLittleEndian(bytes),
        _ => BinaryPrimitives.ReadDoubleLittleEndian(bytes),
    };

    private static int Word(ReadOnlySpan<byte> bytes) =>
        BinaryPrimitives.ReadUInt16LittleEndian(bytes);
}
