using System.Numerics.Tensors;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Generate;

/// <summary>A prompt that is to be answered.</summary>
/// <param name="Tokens">Tokens of the prompt.</param>
/// <param name="Append">Puts it, with its pictures, into a batch as a row.</param>
/// <param name="Number">Keys its random numbers: what is drawn for it does not depend on what is
/// generated beside it.</param>
public sealed record GenerationInput(int Tokens, Action<Batch> Append, ulong Number = 0)
{
    /// <summary>Its tokens, where it may go on from an earlier one.</summary>
    public int[] Ids { get; init; } = [];

    /// <summary>The tokens that each of its pictures takes.</summary>
    public IReadOnlyList<ImageBound> Pictures { get; init; } = [];

    /// <summary>
    /// Puts in a part of it, from a token to another, which do not split a picture; null where it
    /// is run at once.
    /// </summary>
    public Action<Batch, int, int>? AppendPart { get; init; }
}

/// <summary>An answer in tokens.</summary>
/// <param name="Ids">The stop token included, where one came.</param>
/// <param name="Stopped">Whether a stop token came, before max_new_tokens did.</param>
/// <param name="Score">Of beams: the mean of the log-probabilities, by length_penalty.</param>
public sealed record GeneratedTokens(int[] Ids, bool Stopped, double? Score = null);

/// <summary>
/// Answers prompts: each runs once, with its pictures, then all go on a token at a time over a
/// cache of keys and values; an answer that has ended rests while others go on. Prompts run one
/// after the other, and long ones in pieces: these are long enough to fill a device, and need the
/// least memory so.
/// </summary>
/// <param name="model">Answers.</param>
/// <param name="counter">Sees to its memory, where that is not settled otherwise.</param>
public sealed class Generator(LoadedModel model, StepCounter? counter = null)
{
    /// <summary>Most tokens that are brought at once, but for those of one picture.</summary>
    public const int Piece = MiniCpmModel.Piece;

    private readonly CachedModel _cached = new(model, counter);
    private object? _conversation;
    private int[] _held = [];

    /// <summary>Takes the memory for so many sequences of so many tokens in advance.</summary>
    public void Reserve(int sequences, int room)
    {
        _conversation = null;
        _cached.Begin(sequences, room);
    }

    /// <param name="inputs">The prompts of a batch.</param>
    /// <param name="settings">How tokens are chosen.</param>
    /// <param name="said">Called with the number of a prompt and each token of its answer as it
    /// comes, stop tokens not; false ends that answer. Not with beams, which decide at the
    /// end.</param>
    /// <param name="goesOn">Asked before each step; false ends all answers where they are.</param>
    /// <param name="conversation">What a single prompt belongs to: what the cache has of the same
    /// one is not run again. Whoever changes earlier pictures or the adapter gives another
    /// object.</param>
    /// <exception cref="InputException">The settings make no sense.</exception>
    public GeneratedTokens[] Run(
        IReadOnlyList<GenerationInput> inputs, GenerationSettings settings,
        Func<int, int, bool>? said = null, Func<bool>? goesOn = null, object? conversation = null)
    {
        settings.Checked();
        bool recording = model.Graph.Recording;
        Randomness random = model.Device.Random;
        model.Graph.Recording = false;
        model.Device.Random = random with { Dropout = false };
        try
        {
            int room = inputs.Max(input => input.Tokens) + settings.MaxNewTokens;
            int known = Known(inputs, settings, room, conversation);
            _conversation = null;
            if (known == 0) _cached.Begin(inputs.Count * settings.NumBeams, room);
            else _cached.Cut(0, known);
            if (settings.NumBeams > 1)
                return BeamSearch.Run(_cached, inputs, settings, goesOn ?? (() => true));
            GeneratedTokens[] answers =
                Choose(inputs, settings, said, goesOn ?? (() => true), known);
            if (conversation is null || inputs.Count > 1) return answers;
            _conversation = conversation;
            _held = [.. inputs[0].Ids.Concat(answers[0].Ids).Take(_cached.Lengths[0])];
            return answers;
        }
        finally
        {
            model.Graph.EndStep();
            model.Graph.Recording = recording;
            model.Device.Random = random;
        }
    }

    // How many of the prompt's tokens the cache has. The last one is run in any case, for what
    // follows it.
    private int Known(IReadOnlyList<GenerationInput> inputs, GenerationSettings settings,
        int room, object? conversation)
    {
        if (conversation is null || conversation != _conversation || inputs.Count != 1
            || settings.NumBeams > 1 || inputs[0].AppendPart is null || room > _cached.Room)
            return 0;
        int known = Math.Min(
            inputs[0].Ids.AsSpan().CommonPrefixLength(_held), inputs[0].Tokens - 1);
        foreach (ImageBound picture in inputs[0].Pictures)
            if (known > picture.Start && known < picture.End) known = picture.Start;
        return _cached.Reachable(0, known);
    }

    private GeneratedTokens[] Choose(
        IReadOnlyList<GenerationInput> inputs, GenerationSettings settings,
        Func<int, int, bool>? said, Func<bool> goesOn, int known)
    {
        var answers = new Growing<int>[inputs.Count];
        var next = new int[inputs.Count];
        var stopped = new bool[inputs.Count];
        next.AsSpan().Fill(-1);
        for (int i = 0; i < inputs.Count && goesOn(); i++)
        {
            answers[i] = new Growing<int>();
            GenerationInput input = inputs[i];
            Span<float> logits = Append(_cached, i, input, known, goesOn);
            if (_cached.Lengths[i] < input.Tokens) break; // told to stop
            Take(i, logits);
        }

        while (next.AsSpan().ContainsAnyExcept(-1) && goesOn())
        {
            Span<float> logits = _cached.Next(next);
            for (int i = 0, row = 0; i < next.Length; i++)
                if (next[i] >= 0)
                    Take(i, logits.Slice(row++ * _cached.Vocabulary, _cached.Vocabulary));
        }

        return [.. answers.Select((ids, i) =>
            new GeneratedTokens(ids is null ? [] : ids.Span.ToArray(), stopped[i]))];

        void Take(int i, Span<float> logits)
        {
            int id = Token(logits, answers[i].Span, settings, inputs[i].Number);
            answers[i].Add(id);
            stopped[i] = settings.StopIds.Contains(id);
            bool goes = !stopped[i] && said?.Invoke(i, id) != false;
            next[i] = goes && answers[i].Count < settings.MaxNewTokens ? id : -1;
        }
    }

    /// <summary>
    /// Runs a prompt from a token on, in pieces, up to the one that is told not to go on.
    /// </summary>
    /// <returns>The logits behind the last piece that ran.</returns>
    internal static Span<float> Append(
        CachedModel model, int sequence, GenerationInput input, int first, Func<bool> goesOn)
    {
        Span<float> logits = [];
        for (int at = first, to; at < input.Tokens; at = to)
        {
            if (at > first && !goesOn()) break;
            (int from, to) = (at, End(input, at));
            int end = to;
            logits = model.Append(sequence, input.AppendPart is { } part
                ? batch => part(batch, from, end) : input.Append);
        }

        return logits;
    }

    /// <summary>Where the piece of a prompt ends that begins at a token.</summary>
    internal static int End(GenerationInput input, int from)
    {
        if (input.AppendPart is null) return input.Tokens;
        int to = Math.Min(from + Piece, input.Tokens);
        foreach (ImageBound picture in input.Pictures)
            if (to > picture.Start && to < picture.End)
                to = picture.Start > from ? picture.Start : picture.End;
        return to;
    }

    /// <summary>The token behind those generated so far.</summary>
    internal static int Token(
        Span<float> logits, ReadOnlySpan<int> generated, GenerationSettings settings, ulong number)
    {
        Span<float> scores = settings.RepetitionPenalty == 1 ? logits : logits.ToArray();
        Process(logits, scores, generated, settings);
        if (!settings.DoSample)
        {
            int best = TensorPrimitives.IndexOfMax<float>(scores);
            return !float.IsNaN(scores[best]) ? best : throw new RunException(
                "the model's logits are not numbers: its weights or its adapter are damaged");
        }

        Narrow(scores, settings);
        return TokenScores.Draw(
            scores, TokenScores.Uniform(settings.Seed, number, generated.Length));
    }

    /// <summary>What rules out tokens, drawn or not.</summary>
    internal static void Process(
        ReadOnlySpan<float> logits, Span<float> scores, ReadOnlySpan<int> generated,
        GenerationSettings settings)
    {
        TokenScores.Penalise(logits, scores, generated, settings.RepetitionPenalty);
        if (generated.Length < settings.MinNewTokens)
            TokenScores.Forbid(scores, settings.StopIds);
    }

    /// <summary>What shapes the probabilities that are drawn from.</summary>
    internal static void Narrow(Span<float> scores, GenerationSettings settings)
    {
        TokenScores.Warm(scores, settings.Temperature);
        TokenScores.KeepTop(scores, settings.TopK);
        TokenScores.KeepNucleus(scores, settings.TopP);
    }
}
