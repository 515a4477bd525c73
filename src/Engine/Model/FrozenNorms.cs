using System.Numerics.Tensors;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Norms of the rows of frozen weights as a run multiplies by them: DoRA's magnitudes start as
/// these, and its norms are made of their squares. A weight is read once, whoever asks.
/// </summary>
/// <param name="checkpoint">The files.</param>
/// <param name="storage">The run's storage type.</param>
/// <param name="kind">Makes frozen weights of linear layers; null keeps them dense.</param>
public sealed unsafe class FrozenNorms(Checkpoint checkpoint, DType storage, IWeightKind? kind)
{
    private readonly Dictionary<string, double[]> _found = new(StringComparer.Ordinal);

    /// <summary>One for each row.</summary>
    /// <exception cref="InputException">The file cannot be read.</exception>
    public double[] Of(string weight)
    {
        if (_found.TryGetValue(weight, out double[]? norms)) return norms;
        StoredTensor file = checkpoint.Get(weight);
        int rows = file.Shape[0], cols = file.Shape.Cols;
        RowReader? reader = kind?.Reader(file);
        // Quantised files that are kept as they are have no rounding behind them.
        using var stored = reader is null ? new StorageValues(file, 0, file.Count,
            file is PackedTensor ? DType.F32 : storage) : null;
        reader ??= (from, to) =>
        {
            fixed (float* target = to)
                FloatBits.Widen((byte*)stored!.Data + (from * stored.Type.Size()), stored.Type,
                    target, to.Length);
        };
        norms = new double[rows];
        float[] row = new float[cols];
        double[] wide = new double[cols];
        for (int r = 0; r < rows; r++)
        {
            reader((long)r * cols, row);
            TensorPrimitives.ConvertTruncating<float, double>(row, wide);
            norms[r] = TensorPrimitives.Norm<double>(wide);
        }

        _found.Add(weight, norms);
        return norms;
    }
}
