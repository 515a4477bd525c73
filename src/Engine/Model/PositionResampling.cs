using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A square position table resampled to the grid of each picture, as sums of table rows: bicubic
/// with antialiasing as torch has it, whose filter is Pillow's (Keys, a = -1/2), on both axes. On
/// the table's own grid every sum is the one row itself. Kept as a sparse matrix by rows, for
/// <see cref="MiniCpmNative.Kernels.Ops.WeightedGather"/>; its memory is reused and only grows.
/// </summary>
/// <param name="side">The table's rows or columns of positions.</param>
public sealed class PositionResampling(int side)
{
    private readonly Axis _rows = new(), _cols = new();
    private readonly Growing<int> _starts = new(), _ids = new();
    private readonly Growing<float> _weights = new();

    /// <summary>Where each patch's terms start, and the end.</summary>
    public ReadOnlySpan<int> Starts => _starts.Span;

    /// <summary>Table row of each term.</summary>
    public ReadOnlySpan<int> Ids => _ids.Span;

    /// <summary>Factor of each term; those of a patch sum to 1.</summary>
    public ReadOnlySpan<float> Weights => _weights.Span;

    /// <summary>Leaves no picture.</summary>
    public void Clear()
    {
        _starts.Clear();
        _ids.Clear();
        _weights.Clear();
        _starts.Add(0);
    }

    /// <summary>Appends the patches of a picture, row by row.</summary>
    public void Add(int rows, int cols)
    {
        _rows.Compute(side, rows);
        _cols.Compute(side, cols);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
            {
                for (int i = _rows.Starts[r]; i < _rows.Starts[r + 1]; i++)
                    for (int j = _cols.Starts[c]; j < _cols.Starts[c + 1]; j++)
                    {
                        _ids.Add((_rows.Inputs[i] * side) + _cols.Inputs[j]);
                        _weights.Add((float)(_rows.Weights[i] * _cols.Weights[j]));
                    }

                _starts.Add(_ids.Count);
            }
    }

    /// <summary>No less than the terms of a picture.</summary>
    public long MostTerms(int rows, int cols) =>
        (long)rows * Most(rows) * ((long)cols * Most(cols));

    // The filter reaches over twice 2 max(side / outputs, 1) inputs.
    private int Most(int outputs) =>
        Math.Min(side, (int)(4 * Math.Max((double)side / outputs, 1)) + 2);

    /// <summary>The terms of each output on one axis, those of weight 0 left out.</summary>
    private sealed class Axis
    {
        private double[] _taps = [];

        public Growing<int> Starts { get; } = new();

        public Growing<int> Inputs { get; } = new();

        public Growing<double> Weights { get; } = new();

        public void Compute(int inputs, int outputs)
        {
            Starts.Clear();
            Inputs.Clear();
            Weights.Clear();
            Starts.Add(0);
            if (_taps.Length < inputs) _taps = new double[inputs];
            for (int i = 0; i < outputs; i++)
            {
                var (first, end) = BicubicWeights.Taps(inputs, outputs, i, _taps);
                for (int input = first; input < end; input++)
                {
                    if (_taps[input - first] == 0) continue;
                    Inputs.Add(input);
                    Weights.Add(_taps[input - first]);
                }

                Starts.Add(Inputs.Count);
            }
        }
    }
}
