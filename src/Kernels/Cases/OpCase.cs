namespace MiniCpmNative.Kernels.Cases;

/// <summary>One tensor of a problem; its numbers are doubles, whatever it is stored as.</summary>
/// <param name="Type">F64 stands for the type of activations, F32 or F64; others are stored as
/// such.</param>
public sealed record Value(string Name, DType Type, int[] Shape, double[] Data)
{
    /// <summary>Whether it stands for parameters, whose gradient is F32 in training.</summary>
    public bool IsParameter => Name.TrimEnd('1', '2') is "w" or "b" or "a" or "bb" or "table"
        or "a_log" or "dt_bias";

    public bool IsInteger => Type == DType.I32;

    public bool Exists => Type != DType.U8;

    public Spec Spec(DType activations) => Exists
        ? new(Type == DType.F64 ? activations : Type, new Shape(Shape))
        : default;

    public static Value Float(string name, int[] shape, double[] data) =>
        new(name, DType.F64, shape, data);

    public static Value Int(string name, params int[] data) =>
        new(name, DType.I32, [data.Length], Array.ConvertAll(data, i => (double)i));

    /// <summary>An optional input that is not given.</summary>
    public static Value Absent(string name) => new(name, DType.U8, [0], []);
}

/// <summary>
/// The declaration of an operation for tests, benchmarks and the self-test: inputs of any size (so
/// that 0, 1, 7 and 1023 cost one line), and shapes of production.
/// </summary>
public sealed record OpCase(string Name, Op Op, Func<int, Value[]> Inputs,
    Func<Value[]> Production)
{
    /// <summary>Inputs whose number of columns is free, so that no wrong one exists.</summary>
    public string[] FreeColumns { get; init; } = [];

    /// <summary>Sizes n at which float is compared with double.</summary>
    public int[] Sizes { get; init; } = [0, 1, 7, 1023];

    /// <summary>Sizes n of the self-test: rows with and without whole vectors of 16 bytes, and
    /// what makes devices divide their sums.</summary>
    public int[] SelfTestSizes { get; init; } = [15, 64, 1280];

    /// <summary>The operation at production size, where its hyper-parameters hold sizes.</summary>
    public Op? ProductionOp { get; init; }

    /// <summary>Whether dropout is on.</summary>
    public bool Dropout { get; init; }

    public override string ToString() => Name;
}

/// <summary>
/// Random inputs, the same in every run; floats are such that bf16 holds them exactly.
/// </summary>
public static class Fill
{
    public static double[] Normal(int seed, long count, double scale = 1)
    {
        var random = new Random(seed);
        var values = new double[count];
        for (int i = 0; i < values.Length; i++)
        {
            double a = 1 - random.NextDouble(), b = random.NextDouble();
            values[i] = Round(scale * Math.Sqrt(-2 * Math.Log(a)) * Math.Cos(2 * Math.PI * b));
        }

        return values;
    }

    public static int[] Below(int seed, int count, int limit)
    {
        var random = new Random(seed);
        var values = new int[count];
        for (int i = 0; i < count; i++) values[i] = random.Next(limit);
        return values;
    }

    /// <summary>count different numbers below limit, in random or rising order.</summary>
    public static int[] Distinct(int seed, int count, int limit, bool rising = false)
    {
        int[] all = [.. Enumerable.Range(0, limit)];
        new Random(seed).Shuffle(all);
        int[] chosen = all[..count];
        if (rising) Array.Sort(chosen);
        return chosen;
    }

    private static double Round(double value) => BitConverter.Int32BitsToSingle(
        BitConverter.SingleToInt32Bits((float)value) & ~0xFFFF);
}
