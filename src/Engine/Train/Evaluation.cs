using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What an evaluation found. An answer is a run of neighbouring supervised tokens; it is right when
/// every one of them is the model's first choice given the true text before it.
/// </summary>
public sealed record Evaluation(
    double Loss, double TokenAccuracy, double AnswerAccuracy, long Tokens, long Answers, int Rows,
    double Seconds)
{
    /// <summary>
    /// Runs all batches without recording; no logits are kept. Null when it was stopped.
    /// </summary>
    /// <param name="goesOn">Asked before each batch; false stops.</param>
    public static Evaluation? Run(
        TunedModel model, BatchLoader loader, long batches, Func<bool> goesOn)
    {
        var sums = new Sums();
        var started = System.Diagnostics.Stopwatch.StartNew();
        Randomness random = model.Device.Random;
        model.Graph.Recording = false;
        model.Device.Random = random with { Dropout = false };
        try
        {
            for (long i = 0; i < batches; i++)
            {
                if (!goesOn()) return null;
                Batch batch = loader.Take(out _);
                if (batch.Samples > 0) sums.Add(model, batch);
                loader.Return();
            }
        }
        catch (OperationCanceledException)
        {
            return null;
        }
        finally
        {
            model.Graph.EndStep();
            model.Graph.Recording = true;
            model.Device.Random = random;
        }

        return sums.ToEvaluation(started.Elapsed.TotalSeconds);
    }

    private sealed class Sums
    {
        private readonly Tensor[] _perRow = new Tensor[2];
        private readonly Growing<float> _hits = new();
        private double _loss;
        private long _tokens, _hit, _answers, _right;
        private int _rows;

        public void Add(TunedModel model, Batch batch)
        {
            Tensor loss = model.Loss(batch, _perRow);
            _loss += model.Device.ReadFloats(loss)[0];
            _hits.Clear();
            Span<float> hits = _hits.Extend(batch.LabelRows.Count);
            model.Device.Read(_perRow[1], hits);
            model.Graph.EndStep();
            _rows += batch.Samples;
            Count(batch, hits);
        }

        public Evaluation ToEvaluation(double seconds) => new(
            _loss / _tokens, (double)_hit / _tokens, (double)_right / _answers, _tokens,
            _answers, _rows, seconds);

        private void Count(Batch batch, ReadOnlySpan<float> hits)
        {
            ReadOnlySpan<int> rows = batch.LabelRows.Span;
            int sequence = 0;
            bool right = true;
            for (int i = 0; i < rows.Length; i++)
            {
                while (rows[i] >= batch.SequenceStarts[sequence + 1]) sequence++;
                bool hit = hits[i] != 0;
                _tokens++;
                if (hit) _hit++;
                right &= hit;
                bool ends = i + 1 == rows.Length || rows[i + 1] != rows[i] + 1
                    || rows[i + 1] >= batch.SequenceStarts[sequence + 1];
                if (!ends) continue;
                _answers++;
                if (right) _right++;
                right = true;
            }
        }
    }
}
