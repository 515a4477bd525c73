using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// A model over a cache of keys and values: prompts go in one after the other, then all sequences
/// go on a token at a time. What comes out are the next tokens' logits, on the host.
/// </summary>
/// <param name="model">The model.</param>
/// <param name="counter">Sees to its memory, where that is not settled otherwise.</param>
internal sealed class CachedModel(LoadedModel model, StepCounter? counter)
{
    private readonly Batch _batch = new();
    private KeyValueCache? _cache;
    private float[] _logits = [];

    public int Vocabulary => model.Spec.Decoder.VocabSize;

    /// <summary>
    /// Forgets everything. Memory that was there is used again where it is enough.
    /// </summary>
    public void Begin(int sequences, int room)
    {
        if (_cache?.Holds(sequences, room) != true)
            _cache = new KeyValueCache(
                model.Device, model.Spec.Decoder, sequences, room, former: _cache);
        _cache.Clear(sequences, room);
    }

    /// <summary>Most tokens of a sequence.</summary>
    public int Room => _cache!.Room;

    public int Sequences => _cache!.Lengths.Length;

    public ReadOnlySpan<int> Lengths => _cache!.Lengths;

    /// <inheritdoc cref="KeyValueCache.Reachable"/>
    public int Reachable(int sequence, int length) => _cache!.Reachable(sequence, length);

    /// <inheritdoc cref="KeyValueCache.Cut"/>
    public void Cut(int sequence, int length) => _cache!.Cut(sequence, length);

    /// <inheritdoc cref="KeyValueCache.Reorder"/>
    public void Reorder(ReadOnlySpan<int> from)
    {
        counter?.ReserveMoves(_cache!);
        _cache!.Reorder(from);
    }

    /// <summary>
    /// Runs tokens of one sequence, pictures among them, behind those it has. append puts them into
    /// a batch as a row that says where it stands.
    /// </summary>
    /// <returns>logits[vocabulary] behind the last one, valid until the next call.</returns>
    public Span<float> Append(int sequence, Action<Batch> append)
    {
        _batch.Clear();
        for (int s = 0; s < sequence; s++) _batch.SequenceStarts.Add(0);
        append(_batch);
        for (int s = sequence + 1; s < Sequences; s++)
            _batch.SequenceStarts.Add(_batch.Tokens.Count);
        _batch.LabelRows.Clear();
        _batch.LabelRows.Add(_batch.Tokens.Count - 1);
        return Run();
    }

    /// <summary>
    /// Runs the next token of each sequence; a negative one lets its sequence rest.
    /// </summary>
    /// <returns>logits[sequences that do not rest, vocabulary], valid until the next
    /// call.</returns>
    public Span<float> Next(ReadOnlySpan<int> tokens)
    {
        _batch.Clear();
        for (int s = 0; s < tokens.Length; s++)
        {
            if (tokens[s] >= 0)
            {
                _batch.LabelRows.Add(_batch.Tokens.Count);
                _batch.Tokens.Add(tokens[s]);
                _batch.Positions.Add(_cache!.Next[s]);
            }

            _batch.SequenceStarts.Add(_batch.Tokens.Count);
        }

        return Run();
    }

    private Span<float> Run()
    {
        counter?.Reserve(_batch, _cache!);
        Tensor logits = model.Model.LabelLogits(
            model.Graph, model.Hidden(_batch, cache: _cache));
        int count = checked((int)logits.Shape.Count);
        if (_logits.Length < count) _logits = new float[count];
        Span<float> values = _logits.AsSpan(0, count);
        model.Device.ReadFloats(logits, values);
        model.Graph.EndStep();
        return values;
    }
}
