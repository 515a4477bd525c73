using System.Numerics.Tensors;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// Beam search as transformers has it: of each prompt the beams with the largest sums of processed
/// log-probabilities go on; a stop token ends a beam where it is among the first num_beams
/// candidates. A prompt is done when no beam that goes on could become better, by its sum now,
/// than the worst of num_beams ended ones. All beams are sequences of one cache, whose rows move
/// as beams replace each other.
/// </summary>
internal sealed class BeamSearch
{
    private readonly record struct Candidate(double Score, int Beam, int Token);

    private readonly GenerationSettings _settings;
    private readonly int _candidates;
    private readonly List<(double Score, int[] Ids)> _ended = [];
    private readonly (double Score, int[] Ids)[] _beams;
    private readonly int[] _from;

    private BeamSearch(GenerationSettings settings)
    {
        _settings = settings;
        _candidates = (Math.Max(1, settings.StopIds.Count) + 1) * settings.NumBeams;
        _beams = new (double, int[])[settings.NumBeams];
        Array.Fill(_beams, (0, []));
        _from = new int[settings.NumBeams];
    }

    private bool IsDone { get; set; }

    public static GeneratedTokens[] Run(CachedModel model, IReadOnlyList<GenerationInput> inputs,
        GenerationSettings settings, Func<bool> goesOn)
    {
        int beams = settings.NumBeams, vocabulary = model.Vocabulary;
        BeamSearch[] searches = [.. inputs.Select(_ => new BeamSearch(settings))];
        var tokens = new int[inputs.Count * beams];
        var from = new int[tokens.Length];
        for (int i = 0; i < inputs.Count && goesOn(); i++)
        {
            // All beams begin as one, so only its candidates count.
            Span<float> logits =
                Generator.Append(model, i * beams, inputs[i], first: 0, () => true);
            searches[i].Advance(logits, vocabulary, 1);
            searches[i].Place(tokens, from, i * beams);
        }

        for (int step = 1; step < settings.MaxNewTokens && goesOn(); step++)
        {
            if (searches.All(search => search.IsDone)) break;
            model.Reorder(from);
            Span<float> logits = model.Next(tokens);
            for (int i = 0, row = 0; i < searches.Length; i++)
            {
                if (searches[i].IsDone) continue;
                searches[i].Advance(
                    logits.Slice(row * vocabulary, beams * vocabulary), vocabulary, beams);
                searches[i].Place(tokens, from, i * beams);
                row += beams;
            }
        }

        return [.. searches.Select(search => search.Best())];
    }

    // The next tokens and what their beams go on from, of beams that are the cache's from at on.
    private void Place(int[] tokens, int[] from, int at)
    {
        for (int b = 0; b < _beams.Length; b++)
        {
            tokens[at + b] = IsDone ? -1 : _beams[b].Ids[^1];
            from[at + b] = at + (IsDone ? b : _from[b]);
        }
    }

    private void Advance(Span<float> logits, int vocabulary, int beams)
    {
        var found = new List<Candidate>(beams * _candidates);
        for (int b = 0; b < beams; b++)
            Candidates(logits.Slice(b * vocabulary, vocabulary), b, found);
        // Equal sums in the order of beams and tokens.
        Candidate[] best = [.. found.OrderByDescending(c => c.Score).Take(_candidates)];
        var next = new List<(double, int[])>(_beams.Length);
        for (int rank = 0; rank < best.Length && next.Count < _beams.Length; rank++)
        {
            Candidate candidate = best[rank];
            int[] ids = [.. _beams[candidate.Beam].Ids, candidate.Token];
            if (!_settings.StopIds.Contains(candidate.Token))
            {
                _from[next.Count] = candidate.Beam;
                next.Add((candidate.Score, ids));
            }
            else if (rank < _beams.Length)
            {
                End(candidate.Score, ids);
            }
        }

        next.CopyTo(_beams);
        if (_ended.Count < _beams.Length) return;
        double reachable =
            best[0].Score / Math.Pow(_beams[0].Ids.Length, _settings.LengthPenalty);
        IsDone = _settings.EarlyStopping || _ended.Min(end => end.Score) >= reachable;
    }

    private void Candidates(Span<float> logits, int beam, List<Candidate> found)
    {
        (double sum, int[] ids) = _beams[beam];
        // Processors see log-probabilities, and what they leave is not normalised again.
        float largest = TensorPrimitives.Max<float>(logits);
        double all = 0;
        foreach (float logit in logits) all += Math.Exp(logit - largest);
        float shift = (float)(largest + Math.Log(all));
        TensorPrimitives.Subtract(logits, shift, logits);
        float[] scores = logits.ToArray();
        Generator.Process(logits, scores, ids, _settings);
        TokenScores.KeepTop(scores, _candidates);
        for (int token = 0; token < scores.Length; token++)
            if (scores[token] > float.NegativeInfinity)
                found.Add(new Candidate(sum + scores[token], beam, token));
    }

    private void End(double sum, int[] ids)
    {
        double score = sum / Math.Pow(ids.Length, _settings.LengthPenalty);
        if (_ended.Count == _beams.Length)
        {
            var worst = _ended.MinBy(end => end.Score);
            if (score <= worst.Score) return;
            _ended.Remove(worst);
        }

        _ended.Add((score, ids));
    }

    private GeneratedTokens Best()
    {
        if (!IsDone)
            foreach (var (sum, ids) in _beams)
                if (ids.Length > 0) End(sum, ids);
        if (_ended.Count == 0) return new GeneratedTokens([], false);
        var (score, best) = _ended.MaxBy(end => end.Score);
        return new GeneratedTokens(best, _settings.StopIds.Contains(best[^1]), score);
    }
}
