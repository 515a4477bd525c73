namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// The taps of one axis, in fixed point: k = round(w * 2^precision), 22 in Pillow, in torchvision
/// the most with which every k has 16 bits; w the Keys cubic (a = -1/2)
/// stretched by the shrink factor and divided by its sum, all in double, in Pillow's order of
/// operations. Each k is kept as k = high * 2^12 + low with 0 &lt;= low &lt; 2^12, so that both
/// parts are 16-bit factors of multiply-add instructions; the sums of both parts are put together
/// modulo 2^32, which is exact because the whole sum fits. Reused from picture to picture; grows
/// only.
/// </summary>
internal sealed class BicubicWeights
{
    public const int LowBits = 12;

    private const int Most = 22;

    private double[] _taps = [];

    /// <summary>Bits behind the point.</summary>
    public int Precision { get; private set; }

    /// <summary>First input of each output; MaxTaps from there are inside.</summary>
    public int[] First { get; private set; } = [];

    /// <summary>
    /// Four ints for each four taps: the high parts of taps 0 and 1 (16 bits each), of 2 and 3, the
    /// low parts of 0 and 1, of 2 and 3. Taps beyond an output's own are 0.
    /// </summary>
    public int[] Packed { get; private set; } = [];

    /// <summary>Groups of four taps of each output.</summary>
    public int Groups { get; private set; }

    /// <summary>Inputs that one output reads at most.</summary>
    public int MaxTaps { get; private set; }

    /// <summary>
    /// The inputs first..end that output i reads; their weights, which sum to 1, go into taps,
    /// which has room for all inputs or for MaxTaps.
    /// </summary>
    public static (int First, int End) Taps(
        int inputs, int outputs, int i, Span<double> taps)
    {
        double scale = (double)inputs / outputs;
        double stretch = Math.Max(scale, 1.0), inverse = 1.0 / stretch;
        double centre = (i + 0.5) * scale;
        var (first, end) = Reach(centre, 2.0 * stretch, inputs);
        double sum = 0;
        for (int t = 0; t < end - first; t++)
            sum += taps[t] = Keys((t + first - centre + 0.5) * inverse);
        if (sum == 0) return (first, end);
        for (int t = 0; t < end - first; t++) taps[t] /= sum;
        return (first, end);
    }

    public void Compute(int inputs, int outputs, bool narrow = false)
    {
        double scale = (double)inputs / outputs;
        double support = 2.0 * Math.Max(scale, 1.0);
        MaxTaps = 0;
        for (int i = 0; i < outputs; i++)
        {
            var (first, end) = Reach((i + 0.5) * scale, support, inputs);
            MaxTaps = Math.Max(MaxTaps, end - first);
        }

        Groups = (MaxTaps + 3) / 4;
        int stride = Groups * 4;
        if (First.Length < outputs) First = new int[outputs];
        if (Packed.Length < (long)outputs * stride) Packed = new int[checked(outputs * stride)];
        if (_taps.Length < stride) _taps = new double[stride];
        Packed.AsSpan(0, outputs * stride).Clear();
        Precision = narrow ? Narrowest(inputs, outputs) : Most;
        for (int i = 0; i < outputs; i++)
        {
            var (first, end) = Taps(inputs, outputs, i, _taps);
            int count = end - first;

            // Every output reads MaxTaps inputs; at the end that begins earlier, with taps of 0.
            First[i] = Math.Min(first, inputs - MaxTaps);
            int skipped = first - First[i];
            for (int t = 0; t < count; t++)
            {
                double w = _taps[t];
                Pack(i, t + skipped, (int)((w < 0 ? -0.5 : 0.5) + (w * (1 << Precision))));
            }
        }
    }

    /// <summary>k of one tap of an output.</summary>
    public int Tap(int output, int tap)
    {
        int at = (((output * Groups) + (tap >> 2)) * 4) + ((tap >> 1) & 1), shift = (tap & 1) * 16;
        return ((short)(Packed[at] >> shift) << LowBits) + (short)(Packed[at + 2] >> shift);
    }

    private int Narrowest(int inputs, int outputs)
    {
        double largest = 0;
        for (int i = 0; i < outputs; i++)
        {
            var (first, end) = Taps(inputs, outputs, i, _taps);
            for (int t = 0; t < end - first; t++) largest = Math.Max(largest, _taps[t]);
        }

        int precision = 0;
        while (precision < Most && (int)(0.5 + (largest * (1L << (precision + 1)))) < 1 << 15)
            precision++;
        return precision;
    }

    private void Pack(int output, int tap, int k)
    {
        int at = (((output * Groups) + (tap >> 2)) * 4) + ((tap >> 1) & 1), shift = (tap & 1) * 16;
        Packed[at] |= ((k >> LowBits) & 0xffff) << shift;
        Packed[at + 2] |= (k & ((1 << LowBits) - 1)) << shift;
    }

    private static (int First, int End) Reach(double centre, double support, int inputs) =>
        (Math.Max((int)(centre - support + 0.5), 0),
            Math.Min((int)(centre + support + 0.5), inputs));

    private static double Keys(double x)
    {
        const double A = -0.5;
        x = Math.Abs(x);
        if (x < 1.0) return ((((A + 2.0) * x) - (A + 3.0)) * x * x) + 1;
        return x < 2.0 ? (((((x - 5) * x) + 8) * x) - 4) * A : 0.0;
    }
}
