using System.Numerics.Tensors;

namespace MiniCpmNative.Engine.Export;

/// <summary>How far merging moved the values of one tensor.</summary>
internal sealed class WeightChange
{
    private double _sum;
    private long _count, _stored;

    /// <summary>Largest change of a value, before it is rounded to the stored type.</summary>
    public double Largest { get; private set; }

    /// <summary>Mean of the changes' magnitudes, before rounding.</summary>
    public double Mean => _sum / Math.Max(1, _count);

    /// <summary>Share of the values that are others as they are stored.</summary>
    public double Stored => (double)_stored / Math.Max(1, _count);

    /// <summary>Counts some values; before is overwritten.</summary>
    /// <param name="before">Values as they were.</param>
    /// <param name="after">Merged.</param>
    /// <param name="rounded">Merged, as they are stored.</param>
    public void Add(Span<float> before, ReadOnlySpan<float> after, ReadOnlySpan<float> rounded)
    {
        for (int i = 0; i < before.Length; i++)
            if (before[i] != rounded[i]) _stored++;
        TensorPrimitives.Subtract(after, before, before);
        _sum += TensorPrimitives.SumOfMagnitudes<float>(before);
        _count += before.Length;
        if (before.Length > 0)
            Largest = Math.Max(Largest, Math.Abs(TensorPrimitives.MaxMagnitude<float>(before)));
    }
}
