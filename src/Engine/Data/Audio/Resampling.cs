namespace MiniCpmNative.Engine.Data.Audio;

/// <summary>
/// Samples at another rate: a low-pass filter at the lower of the two Nyquist frequencies, a sinc
/// of 32 zero crossings a side under a Kaiser window (beta 9: what is folded back is 90 dB down),
/// read where each new sample lies. The official code's resampler is another filter of that kind;
/// below the last tenth of the band both leave a signal as it is.
/// </summary>
internal static class Resampling
{
    private const int Crossings = 32;
    private const double Beta = 9, Band = 0.95;

    public static float[] Run(float[] samples, int from, int to)
    {
        if (from == to) return samples;
        long divisor = Divisor(from, to), up = to / divisor, down = from / divisor;
        // Cycles a sample of what may pass, and how far the filter reaches.
        double cutoff = Band * Math.Min(1, (double)to / from);
        double reach = Crossings / cutoff;
        var result = new float[((samples.Length * up) + down - 1) / down];
        // As many filters as there are places between two samples.
        var filters = new Dictionary<long, float[]>();
        int half = (int)Math.Ceiling(reach);
        for (long i = 0; i < result.Length; i++)
        {
            long at = i * down / up, phase = i * down % up;
            if (!filters.TryGetValue(phase, out float[]? filter))
                filters[phase] = filter = Filter((double)phase / up, half, cutoff, reach);
            double sum = 0;
            for (int k = 0; k < filter.Length; k++)
            {
                long source = at + k - half + 1;
                if (source >= 0 && source < samples.Length) sum += filter[k] * samples[source];
            }

            result[i] = (float)sum;
        }

        return result;
    }

    private static float[] Filter(double offset, int half, double cutoff, double reach)
    {
        var filter = new float[2 * half];
        for (int k = 0; k < filter.Length; k++)
        {
            double x = k - half + 1 - offset;
            if (Math.Abs(x) >= reach) continue;
            double angle = Math.PI * cutoff * x, share = x / reach;
            double sinc = angle == 0 ? 1 : Math.Sin(angle) / angle;
            filter[k] = (float)(cutoff * sinc
                * Bessel(Beta * Math.Sqrt(1 - (share * share))) / Bessel(Beta));
        }

        return filter;
    }

    // The modified Bessel function of order 0, by its series.
    private static double Bessel(double x)
    {
        double sum = 1, term = 1;
        for (int k = 1; term > 1e-12 * sum; k++)
        {
            term *= x / (2 * k) * (x / (2 * k));
            sum += term;
        }

        return sum;
    }

    private static long Divisor(long a, long b) => b == 0 ? a : Divisor(b, a % b);
}
