using System.Buffers.Binary;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Audio;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Sound files, other rates, Whisper's features.</summary>
[TestFixture]
public sealed class SoundTests
{
    private static readonly float[] s_samples = [0, 0.5f, -0.5f, 0.25f, -1, 0.75f];
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // transformers 4.51.3, whose own sums are F32.
    [Test]
    public void FeaturesAreTheExtractors()
    {
        File.WriteAllBytes(Path.Combine(_folder, "log_mel.safetensors"),
            ReferenceText.Bytes("o45/audio/log_mel.safetensors"));
        var wanted = ReferenceFile.OpenAt(Path.Combine(_folder, "log_mel"));
        float[] waveform = [.. wanted.Doubles("waveform").Select(v => (float)v)];
        double[] filters = wanted.Doubles("mel_filters"), found = LogMel.Filters(80);
        for (int bin = 0; bin < 201; bin++)
            for (int band = 0; band < 80; band++)
                Assert.That(found[(band * 201) + bin],
                    Is.EqualTo(filters[(bin * 80) + band]).Within(1e-8), $"{band}, {bin}");
        float[] got = new LogMel(80).Run(waveform);
        Assert.That(got, Has.Length.EqualTo(80 * 138));
        Assert.That(V26.LargestError(got, wanted.Doubles("waveform.mel")), Is.LessThan(1e-5));
    }

    // What a click is heard by depends on where it is: mirrored at the start, cut at the end.
    [Test]
    public void AClipsEndsAreThoseOfTheExtractor()
    {
        double[] filters = LogMel.Filters(80);
        // The window's centre is 0.5 s: a click there is as loud as the window, 1.
        var click = new float[16001];
        click[8000] = 1;
        float[] features = new LogMel(80).Run(click);
        Assert.That(features, Has.Length.EqualTo(80 * 101));
        double power = Filters(40);
        Assert.That(
            features[(40 * 101) + 50], Is.EqualTo((Math.Log10(power) + 4) / 4).Within(1e-6));
        // A click behind the last frame's centre is heard by frames that are left out too.
        click = new float[16000];
        click[^1] = 1;
        features = new LogMel(80).Run(click);
        double hann = 0.5 - (0.5 * Math.Cos(2 * Math.PI * 199 / 400));
        double loudest = Math.Log10(hann * hann * Enumerable.Range(0, 80).Max(Filters));
        Assert.That(features[0], Is.EqualTo((loudest - 8 + 4) / 4).Within(1e-6));
        Assert.That(() => new LogMel(80).Run(new float[LogMel.MostSamples + 1]),
            Throws.ArgumentException);

        // A band's share of white noise of power 1.
        double Filters(int band) => filters.AsSpan(band * 201, 201).ToArray().Sum();
    }

    [TestCase(1, 8)]
    [TestCase(1, 16)]
    [TestCase(1, 24)]
    [TestCase(1, 32)]
    [TestCase(3, 32)]
    [TestCase(3, 64)]
    public void EveryKindOfSampleIsRead(int kind, int bits)
    {
        byte[] data = [.. s_samples.SelectMany(s => Bytes(s, kind, bits))];
        foreach (byte[] file in (byte[][])[Wav(kind, bits, 1, 16000, data),
            Wav(kind, bits, 1, 16000, data, extensible: true, between: 3)])
            Assert.That(SoundReader.Read(file, "a.wav"), Is.EqualTo(s_samples));
    }

    [Test]
    public void ChannelsAreAveragedAndAnOpenLengthIsTheRest()
    {
        byte[] data = [.. s_samples.SelectMany(s => Bytes(s, 3, 32))];
        byte[] file = Wav(3, 32, 2, 16000, data);
        BinaryPrimitives.WriteUInt32LittleEndian(
            file.AsSpan(file.Length - data.Length - 4), uint.MaxValue);
        Assert.That(
            SoundReader.Read(file, "a.wav"), Is.EqualTo((float[])[0.25f, -0.125f, -0.125f]));
    }

    [TestCase(8000, 440)]
    [TestCase(22050, 3000)]
    [TestCase(44100, 1000)]
    [TestCase(48000, 6000)]
    public void AToneIsTheSameAtAnotherRate(int rate, int hertz)
    {
        float[] got = Resampling.Run(Tone(rate, hertz, rate / 2), rate, 16000);
        Assert.That(got, Has.Length.EqualTo(8000));
        float[] wanted = Tone(16000, hertz, 8000);
        for (int i = 200; i < 7800; i++)
            Assert.That(got[i], Is.EqualTo(wanted[i]).Within(2e-4), $"{i}");
    }

    [Test]
    public void WhatTheNewRateCannotHoldIsNotFoldedBack() => Assert.That(
        Resampling.Run(Tone(44100, 10000, 22050), 44100, 16000)[200..7800].Max(MathF.Abs),
        Is.LessThan(1e-4));

    [Test]
    public void WrongFilesAreNamed()
    {
        byte[] data = [.. s_samples.SelectMany(s => Bytes(s, 1, 16))];
        byte[] file = Wav(1, 16, 1, 16000, data);
        AssertSays(file[..^2], "a.wav: is cut: 12 bytes of samples are announced, 10 are there");
        AssertSays(file[..36], "a.wav: is a WAV file without samples (no data chunk)");
        AssertSays(Wav(1, 16, 1, 16000, []), "a.wav: holds no sound");
        AssertSays(
            Wav(6, 8, 1, 8000, data), "a.wav: is a WAV file of format 6 with 8 bits a sample");
        AssertSays(Wav(1, 16, 0, 16000, data), "a.wav: has 0 channels at 16000 Hz");
        AssertSays(Wav(1, 16, 1, 10, data), "a.wav: has 1 channels at 10 Hz");
        AssertSays(Wav(3, 32, 1, 16000, Bytes(float.NaN, 3, 32)), "a.wav: sample 0 is not finite");
        AssertSays(Wav(1, 8, 1, 1000, new byte[1_801_000]), "a.wav: is longer than 1,800 s");
        AssertSays(Wav(1, 8, 1, 48000, new byte[(1 << 25) + 1]),
            "a.wav: has 33,554,433 samples a channel, at most 33,554,432 are read: cut it");
        AssertSays([1, 2, 3], "a.wav: is no sound file that is known, expected WAV, FLAC, MP3");
        foreach (int length in Enumerable.Range(0, file.Length))
            Assert.That(() => SoundReader.Read(file[..length], "a.wav"),
                Throws.TypeOf<InputException>(), $"{length}");
    }

    [Test, Platform(Exclude = "Win")]
    public void OtherFormatsNeedFfmpeg()
    {
        byte[] flac = [.. "fLaC"u8, .. new byte[100000]];
        Assert.That(() => SoundReader.Read(flac, "a.flac", Path.Combine(_folder, "none")),
            Throws.TypeOf<InputException>().With.Message.EqualTo(
                "a.flac: is FLAC, which is read by ffmpeg, and there is none on this machine: "
                + "install it, or convert the file to WAV"));
        // 0.5 and -2 in F32 for a file that it has read whole.
        string program = Program("test $(wc -c) = 100004 && printf '\\0\\0\\0\\077\\0\\0\\0\\300'");
        Assert.That(SoundReader.Read(flac, "a.flac", program), Is.EqualTo((float[])[0.5f, -2]));
        program = Program("echo it is damaged >&2; exit 1");
        Assert.That(() => SoundReader.Read(flac, "a.flac", program),
            Throws.TypeOf<InputException>().With.Message.EqualTo(
                "a.flac: ffmpeg cannot decode it: it is damaged"));
    }

    private static void AssertSays(byte[] file, string message) => Assert.That(
        () => SoundReader.Read(file, "a.wav"),
        Throws.TypeOf<InputException>().With.Message.StartsWith(message));

    private string Program(string script)
    {
        string path = Path.Combine(_folder, $"{Guid.NewGuid()}");
        File.WriteAllText(path, "#!/bin/sh\n" + script + "\n");
        if (!OperatingSystem.IsWindows())
            File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserExecute);
        return path;
    }

    private static float[] Tone(int rate, int hertz, int count) =>
        [.. Enumerable.Range(0, count)
            .Select(i => (float)Math.Sin(2 * Math.PI * hertz * i / rate))];

    private static byte[] Bytes(float sample, int kind, int bits)
    {
        if (kind == 3)
            return bits == 32
                ? BitConverter.GetBytes(sample) : BitConverter.GetBytes((double)sample);
        long most = 1L << (bits - 1), value = Math.Min((long)(sample * most), most - 1);
        return bits == 8 ? [(byte)(value + 128)] : BitConverter.GetBytes(value)[..(bits / 8)];
    }

    private static byte[] Wav(int kind, int bits, int channels, int rate, byte[] data,
        bool extensible = false, int between = 0)
    {
        var file = new MemoryStream();
        using var writer = new BinaryWriter(file);
        writer.Write("RIFF"u8);
        writer.Write(0);
        writer.Write("WAVEfmt "u8);
        writer.Write(extensible ? 40 : 16);
        writer.Write((ushort)(extensible ? 0xFFFE : kind));
        writer.Write((ushort)channels);
        writer.Write(rate);
        writer.Write(rate * channels * bits / 8);
        writer.Write((ushort)(channels * bits / 8));
        writer.Write((ushort)bits);
        if (extensible)
        {
            writer.Write((ushort)22);
            writer.Write((ushort)bits);
            writer.Write(4);
            writer.Write((ushort)kind);
            writer.Write(new byte[14]);
        }

        if (between > 0)
        {
            writer.Write("LIST"u8);
            writer.Write(between);
            writer.Write(new byte[between + (between & 1)]);
        }

        writer.Write("data"u8);
        writer.Write(data.Length);
        writer.Write(data);
        return file.ToArray();
    }
}
