using System.Numerics.Tensors;

namespace MiniCpmNative.Engine.Data.Audio;

/// <summary>
/// Whisper's features of sound: every 10 ms the power of 25 ms under a Hann window, in bands of the
/// mel scale (Slaney's, of area 1), log10, at most 8 below the loudest, then (x + 4) / 4. A clip is
/// filled up with silence to 30 s, which decides what the frames at its end see; frames that are
/// silence alone are left out. As WhisperFeatureExtractor of transformers, which computes in F32.
/// </summary>
public sealed class LogMel
{
    /// <summary>Samples in the longest clip.</summary>
    public const int MostSamples = 30 * SoundReader.Rate;

    private const int Window = 400, Hop = 160, Bins = (Window / 2) + 1;
    private const double Highest = SoundReader.Rate / 2.0, Linear = 200.0 / 3, Corner = 1000;

    private static readonly double s_step = Math.Log(6.4) / 27;

    private readonly int _bands;
    private readonly double[] _filters;
    // Rows of cosines, then of sines, each under the window.
    private readonly double[] _waves = new double[2 * Bins * Window];

    /// <param name="bands">num_mel_bins.</param>
    public LogMel(int bands)
    {
        _bands = bands;
        _filters = Filters(bands);
        for (int bin = 0; bin < Bins; bin++)
            for (int i = 0; i < Window; i++)
            {
                double hann = 0.5 - (0.5 * Math.Cos(2 * Math.PI * i / Window));
                double angle = 2 * Math.PI * (bin * i % Window) / Window;
                _waves[(bin * Window) + i] = hann * Math.Cos(angle);
                _waves[((Bins + bin) * Window) + i] = hann * Math.Sin(angle);
            }
    }

    /// <summary>Frames of a clip.</summary>
    public static int Frames(int samples) => (samples + Hop - 1) / Hop;

    /// <summary>samples[n] -> [bands, frames], a band behind the other.</summary>
    public float[] Run(ReadOnlySpan<float> samples)
    {
        if (samples.Length is 0 or > MostSamples)
            throw new ArgumentException($"{samples.Length} samples, expected 1 to {MostSamples}");
        int frames = Frames(samples.Length);
        // The loudest may be in a frame that is left out and ends in the clip.
        int seen = Math.Min(frames + 2, MostSamples / Hop);
        var logs = new double[_bands * seen];
        var part = new double[Window];
        var power = new double[Bins];
        double loudest = double.MinValue;
        for (int frame = 0; frame < seen; frame++)
        {
            for (int i = 0; i < Window; i++)
                part[i] = At(samples, (frame * Hop) + i - (Window / 2));
            for (int bin = 0; bin < Bins; bin++)
            {
                double cos = Wave(bin), sin = Wave(Bins + bin);
                power[bin] = (cos * cos) + (sin * sin);
            }

            for (int band = 0; band < _bands; band++)
            {
                double sum = TensorPrimitives.Dot<double>(
                    _filters.AsSpan(band * Bins, Bins), power);
                double log = logs[(band * seen) + frame] = Math.Log10(Math.Max(sum, 1e-10));
                loudest = Math.Max(loudest, log);
            }
        }

        var result = new float[_bands * frames];
        for (int band = 0; band < _bands; band++)
            for (int frame = 0; frame < frames; frame++)
                result[(band * frames) + frame] = (float)(
                    (Math.Max(logs[(band * seen) + frame], loudest - 8) + 4) / 4);
        return result;

        double Wave(int row) =>
            TensorPrimitives.Dot<double>(_waves.AsSpan(row * Window, Window), part);
    }

    // Mirrored at the start, silence behind the end; mirrored too at the end of 30 s.
    private static double At(ReadOnlySpan<float> samples, int index)
    {
        if (index < 0) index = -index;
        if (index >= MostSamples) index = (2 * (MostSamples - 1)) - index;
        return index < samples.Length ? samples[index] : 0;
    }

    // [bands, bins]: triangles between neighbours on the scale.
    internal static double[] Filters(int bands)
    {
        var edges = new double[bands + 2];
        for (int i = 0; i < edges.Length; i++) edges[i] = Hertz(Mel(Highest) * i / (bands + 1));
        var filters = new double[bands * Bins];
        for (int band = 0; band < bands; band++)
            for (int bin = 0; bin < Bins; bin++)
            {
                double hertz = Highest * bin / (Bins - 1);
                double rises = (hertz - edges[band]) / (edges[band + 1] - edges[band]);
                double falls = (edges[band + 2] - hertz) / (edges[band + 2] - edges[band + 1]);
                filters[(band * Bins) + bin] = Math.Max(0, Math.Min(rises, falls))
                    * 2 / (edges[band + 2] - edges[band]);
            }

        return filters;
    }

    // Linear up to 1000 Hz, logarithmic above.
    private static double Mel(double hertz) => hertz < Corner
        ? hertz / Linear : (Corner / Linear) + (Math.Log(hertz / Corner) / s_step);

    private static double Hertz(double mel) => mel < Corner / Linear
        ? mel * Linear : Corner * Math.Exp((mel - (Corner / Linear)) * s_step);
}
