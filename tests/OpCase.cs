using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>One tensor of a problem; its numbers are doubles, whatever it is stored as.</summary>
/// <param name="Type">F64 stands for the type of activations, F32 or F64; others are stored as
/// such.</param>
internal sealed record Value(string Name, DType Type, int[] Shape, double[] Data)
{
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
/// Which result an expectation is about: the output, a saved tensor, an input's gradient.
/// </summary>
internal enum Slot
{
    Output,
    Saved,
    Gradient,
}

internal sealed record Expected(
    Slot Slot, int Index, string Name, double[] Values, double F32Error, bool Rounded,
    double Relative = 0);

/// <summary>
/// An operation, its inputs, the gradient of its output, and results that PyTorch computed.
/// </summary>
internal sealed record Problem(
    Op Op, Value[] Inputs, double[] OutputGradient, Expected[] Expected);

/// <summary>
/// The declaration of an operation for tests and benchmarks: inputs of any size (so that 0, 1, 7
/// and 1023 cost one line), shapes of production, and how a reference case becomes a problem.
/// </summary>
internal sealed record OpCase(string Name, Op Op, Func<int, Value[]> Inputs,
    Func<Value[]> Production)
{
    /// <summary>Reference file under ops/; null where PyTorch has none.</summary>
    public string? Reference { get; init; }

    /// <summary>
    /// Turns a case of the file into a problem; null skips one that another test covers.
    /// </summary>
    public Func<ReferenceCase, Problem?>? Problem { get; init; }

    /// <summary>Inputs whose number of columns is free, so that no wrong one exists.</summary>
    public string[] FreeColumns { get; init; } = [];

    /// <summary>Sizes n at which float is compared with double.</summary>
    public int[] Sizes { get; init; } = [0, 1, 7, 1023];

    /// <summary>The operation at production size, where its hyper-parameters hold sizes.</summary>
    public Op? ProductionOp { get; init; }

    /// <summary>Whether dropout is on.</summary>
    public bool Dropout { get; init; }

    public override string ToString() => Name;
}

/// <summary>
/// Random inputs, the same in every run; floats are such that bf16 holds them exactly.
/// </summary>
internal static class Fill
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
