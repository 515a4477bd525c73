using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Keys and values that the layers of a decoder have computed for some sequences, so that only the
/// tokens that follow need to be run. Every sequence has the same room, in each layer rows of its
/// own, or, where a layer is a gated delta rule, a state that all of its tokens went into. A batch
/// brings the next tokens of all sequences, none for one that rests. The memory stays
/// allocated as long as the device: a cache is cleared and used again. Nothing trained runs over
/// one, for the keys in it have no gradient.
/// </summary>
public sealed class KeyValueCache : IBatchInput
{
    private readonly CacheAppend _append = new();
    private readonly Device _device;
    private readonly (Tensor Keys, Tensor Values)[] _layers;
    private readonly (Tensor Inputs, Tensor State)[] _states = [];
    private readonly DeltaSpec? _delta;
    private readonly long _rows;
    private readonly int _most;
    private int[] _lengths = [], _starts = [], _next = [];
    private Tensor _slots;

    /// <param name="device">Holds it, in its type of activations.</param>
    /// <param name="spec">The decoder.</param>
    /// <param name="sequences">How many rows a batch has.</param>
    /// <param name="room">Most tokens of a sequence.</param>
    /// <param name="former">
    /// One that is used no more, but stays allocated: of what it had too little of, this one has
    /// at least twice as much, so that all former ones together are no larger.
    /// </param>
    public KeyValueCache(
        Device device, DecoderSpec spec, int sequences, int room, KeyValueCache? former = null)
    {
        _device = device;
        (_delta, _most) = (spec.Delta, checked((int)Larger(sequences, former?._most ?? 0)));
        _rows = checked((int)Larger((long)sequences * room, former?._rows ?? 0));
        var rows = new Spec(
            device.Activations, new Shape((int)_rows, spec.KvHeads * spec.HeadDim));
        _layers = new (Tensor, Tensor)[spec.Layers];
        if (_delta is not null) _states = new (Tensor, Tensor)[spec.Layers];
        for (int i = 0; i < _layers.Length; i++)
            if (_delta is { } delta && delta.Layers[i]) _states[i] = NewState(delta, _most);
            else
                _layers[i] = (
                    device.Allocate(rows, "cached keys"), device.Allocate(rows, "cached values"));
        Clear(sequences, room);

        static long Larger(long wanted, long had) => wanted <= had ? had
            : Math.Max(wanted, 2 * had);
    }

    /// <summary>Bytes of the step's memory that moving rows takes at most.</summary>
    public long MoveBytes => _layers.Concat(_states).Max(
        layer => Math.Max(Bytes(layer.Item1), Bytes(layer.Item2)));

    /// <summary>Bytes of all of it.</summary>
    public long TotalBytes => _layers.Concat(_states).Sum(
        layer => Bytes(layer.Item1) + Bytes(layer.Item2));

    /// <summary>Most tokens of a sequence.</summary>
    public int Room { get; private set; }

    /// <summary>
    /// Tokens of each sequence, those of the batch that was loaded last included.
    /// </summary>
    public ReadOnlySpan<int> Lengths => _lengths;

    /// <summary>
    /// The position of each sequence's next token: its length, or, where pictures lie on canvases,
    /// one more than any of its tokens has.
    /// </summary>
    public ReadOnlySpan<int> Next => _next;

    /// <summary>I32[sequences + 1]: where the rows of each sequence start, and the end.</summary>
    public Tensor KeyStarts { get; private set; }

    /// <summary>I32[sequences]: how many of its rows count.</summary>
    public Tensor KeyLengths { get; private set; }

    /// <summary>Forgets all sequences.</summary>
    public void Clear()
    {
        Array.Clear(_lengths);
        Array.Clear(_next);
        foreach (var (inputs, state) in _states)
            if (state.Exists)
            {
                _device.Fill(inputs, 0);
                _device.Fill(state, 0);
            }
    }

    /// <summary>Whether the memory is enough for so many sequences of so many tokens.</summary>
    public bool Holds(int sequences, int room) => (long)sequences * room <= _rows
        && (_delta is null || sequences <= _most);

    /// <summary>Forgets all sequences and shares the memory out anew.</summary>
    /// <exception cref="ShapeException">There is too little of it.</exception>
    public void Clear(int sequences, int room)
    {
        if (!Holds(sequences, room))
            throw new ShapeException($"key/value cache: {sequences} sequences of {room} tokens, "
                + $"there is room for {_rows} tokens in all");
        Room = room;
        (_lengths, _next) = (new int[sequences], new int[sequences]);
        _starts = new int[sequences + 1];
        for (int s = 0; s <= sequences; s++) _starts[s] = s * room;
        Clear();
    }

    /// <summary>
    /// How many of a sequence's first tokens it can go on from: these, or none where states cannot
    /// be taken back.
    /// </summary>
    public int Reachable(int sequence, int length) =>
        _delta is null || length == _lengths[sequence] ? length : 0;

    /// <summary>Forgets a sequence's tokens from this one on, a reachable one.</summary>
    // What is put behind a cut says where it stands.
    public void Cut(int sequence, int length) => (_lengths[sequence], _next[sequence]) =
        (Math.Min(length, _lengths[sequence]), 0);

    /// <summary>
    /// Sequence s goes on from what sequence from[s] has, as the beams of a search do.
    /// </summary>
    public void Reorder(ReadOnlySpan<int> from)
    {
        int[] lengths = new int[from.Length], next = new int[from.Length];
        for (int s = 0; s < from.Length; s++)
            (lengths[s], next[s]) = (_lengths[from[s]], _next[from[s]]);
        foreach (var (keys, values) in _layers)
        {
            if (!keys.Exists) continue;
            Move(keys, from, Room, lengths);
            Move(values, from, Room, lengths);
        }

        foreach (var (inputs, state) in _states)
        {
            if (!state.Exists) continue;
            Move(inputs, from, inputs.Shape[0] / _most);
            Move(state, from, state.Shape[0] / _most);
        }

        (_lengths, _next) = (lengths, next);
    }

    /// <summary>
    /// What a layer of gated delta rule goes on from, and leaves behind: its convolution's last
    /// inputs [sequences * (kernel - 1), channels] and its heads' states.
    /// </summary>
    public (Tensor Inputs, Tensor State) State(int layer)
    {
        var (inputs, state) = _states[layer];
        return (inputs.Slice(0, inputs.Shape[0] / _most * _lengths.Length),
            state.Slice(0, state.Shape[0] / _most * _lengths.Length));
    }

    /// <summary>
    /// Puts keys and values[tokens, kvHeads * headDim] of the loaded batch behind those that a
    /// layer has, and returns the layer's whole cache, [sequences * room, kvHeads * headDim].
    /// </summary>
    public (Tensor Keys, Tensor Values) Append(Graph graph, int layer, Tensor keys, Tensor values)
    {
        var cached = _layers[layer];
        graph.Run(_append, cached.Keys, keys, _slots);
        graph.Run(_append, cached.Values, values, _slots);
        int rows = _starts[^1];
        return (cached.Keys.Slice(0, rows), cached.Values.Slice(0, rows));
    }

    // Asked before anything is brought over, so what does not fit is refused here.
    /// <exception cref="ShapeException">
    /// The batch has another number of rows, or one of them has no room any more; nothing changed.
    /// </exception>
    public long Count(Batch batch)
    {
        ReadOnlySpan<int> starts = batch.SequenceStarts.Span;
        if (starts.Length != _starts.Length)
            throw new ShapeException($"key/value cache: a batch of {starts.Length - 1} sequences, "
                + $"expected {_lengths.Length}, those of the cache");
        for (int s = 0; s < _lengths.Length; s++)
            if (starts[s + 1] - starts[s] > Room - _lengths[s])
                throw new ShapeException($"key/value cache: {starts[s + 1] - starts[s]} tokens for "
                    + $"sequence {s}, which has {_lengths[s]} of at most {Room}");
        return (long)batch.Tokens.Count + _starts.Length + _lengths.Length;
    }

    public void Load(Batch batch, BatchUpload upload)
    {
        ReadOnlySpan<int> starts = batch.SequenceStarts.Span;
        Growing<int> slots = upload.Scratch;
        slots.Clear();
        for (int s = 0; s < _lengths.Length; s++)
            for (int i = starts[s]; i < starts[s + 1]; i++)
            {
                slots.Add(_starts[s] + _lengths[s]++);
                _next[s] = Math.Max(_next[s], 1 + (batch.Places.Count > 0
                    ? batch.Places[i].Largest : batch.Positions[i]));
            }

        _slots = upload.Ints(slots.Span, "cache slots");
        KeyStarts = upload.Ints(_starts, "key starts");
        KeyLengths = upload.Ints(_lengths, "key lengths");
    }

    private static long Bytes(in Tensor tensor) => tensor.Exists ? tensor.Spec.Bytes : 0;

    private (Tensor Inputs, Tensor State) NewState(DeltaSpec delta, int sequences) => (
        _device.Allocate(new Spec(_device.Activations, new Shape(
            checked(sequences * (delta.Kernel - 1)), delta.Channels)), "last inputs"),
        _device.Allocate(new Spec(_device.Activations.Statistics(), new Shape(
            checked(sequences * delta.ValueHeads * delta.KeyDim), delta.ValueDim)), "states"));

    // All that moves is copied out first, since what is written may be another one's source. Each
    // sequence has so many rows, of which its length counts, or all.
    private void Move(Tensor rows, ReadOnlySpan<int> from, int each, int[]? lengths = null)
    {
        ArenaMark mark = _device.Step.Mark();
        var copies = new Tensor[from.Length];
        for (int s = 0; s < from.Length; s++)
        {
            if (from[s] == s || lengths?[s] == 0) continue;
            Tensor source = rows.Slice(from[s] * each, lengths?[s] ?? each);
            copies[s] = _device.Step.Push(source.Spec, "moved keys");
            _device.Copy(source, copies[s]);
        }

        for (int s = 0; s < from.Length; s++)
            if (copies[s].Exists) _device.Copy(copies[s], rows.Slice(s * each, copies[s].Shape[0]));
        _device.Step.Pop(mark);
    }
}
