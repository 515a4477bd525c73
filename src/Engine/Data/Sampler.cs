using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// The order of the rows: in each epoch a permutation that depends on (seed, epoch) alone, so that
/// a position in the data is two numbers and a resumed run needs nothing else. Fisher-Yates over
/// splitmix64, written out because the order must not change with a library version.
/// </summary>
public sealed class Sampler
{
    private readonly int[] _order;
    private readonly bool _shuffle;
    private readonly ulong _seed;
    private readonly int _batch;
    private int _epoch;

    public Sampler(TrainArguments arguments, int rows)
        : this(rows, arguments.PerDeviceTrainBatchSize,
            arguments.TrainSamplingStrategy == SamplingStrategy.Random,
            (ulong)(arguments.DataSeed ?? arguments.Seed))
    {
    }

    public Sampler(int rows, int batch, bool shuffle, ulong seed)
    {
        (_order, _batch, _shuffle, _seed) = (new int[rows], batch, shuffle, seed);
        Fill(0);
    }

    /// <summary>
    /// Row numbers of one micro-batch; the last one of an epoch may be shorter. Valid until a batch
    /// of another epoch is asked for. Allocates nothing.
    /// </summary>
    public ReadOnlySpan<int> Batch(int epoch, int index)
    {
        if (epoch != _epoch) Fill(epoch);
        int first = index * _batch;
        return _order.AsSpan(first, Math.Min(_batch, _order.Length - first));
    }

    private void Fill(int epoch)
    {
        _epoch = epoch;
        for (int i = 0; i < _order.Length; i++) _order[i] = i;
        if (!_shuffle) return;
        ulong state = Mix(_seed) ^ Mix(~(ulong)epoch);
        for (int i = _order.Length - 1; i > 0; i--)
        {
            state += 0x9E3779B97F4A7C15;
            // The high half of a 64 x 32 bit product is uniform up to 2^-32 of the range.
            int j = (int)Math.BigMul(Mix(state), (ulong)(i + 1), out _);
            (_order[i], _order[j]) = (_order[j], _order[i]);
        }
    }

    private static ulong Mix(ulong z)
    {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
}
