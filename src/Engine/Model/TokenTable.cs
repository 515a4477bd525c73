using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// The low-rank adapter of a matrix that no linear layer multiplies by: of a table A[rows, rank],
/// PEFT's lora_embedding_A transposed, so that its rows are looked up too, else A[rank, inputs];
/// B[outputs, rank].
/// </summary>
public sealed record LowRankPart(Adapter Adapter, double Dropout, Tensor A, Tensor B);

/// <summary>
/// Rows that take the place of a matrix's rows of these numbers (PEFT's trainable_token_indices):
/// Values[n, cols], trained, and Original[n, cols], the matrix's own.
/// </summary>
public sealed record TokenRows(IReadOnlyList<int> Ids, Tensor Values, Tensor Original);

/// <summary>
/// Embedding of tokens, y[t] = scale * table[ids[t]], with what an adapter does to it: a low-rank
/// part, without dropout as in PEFT, or rows of its own for some tokens.
/// </summary>
public sealed class TokenTable : IBatchInput
{
    private static readonly Linear s_linear = new();
    private static readonly Embedding s_plain = new();
    private static readonly Splice s_splice = new();

    private readonly Tensor _table;
    private readonly Embedding _lookUp;
    private readonly LowRankPart? _low;
    private readonly Add? _add;
    private readonly TokenRows? _rows;
    private readonly Dictionary<int, int> _places = [];
    private Tensor _slots, _which;

    /// <param name="table">[vocabulary, width].</param>
    /// <param name="scale">Of what is looked up.</param>
    /// <param name="low">Its adapter, or null.</param>
    /// <param name="rows">Rows of its own, or null.</param>
    public TokenTable(Tensor table, double scale, LowRankPart? low, TokenRows? rows)
    {
        (_table, _lookUp, _low, _rows) = (table, new Embedding(scale), low, rows);
        if (low is not null) _add = new Add(scale * low.Adapter.Scale);
        for (int i = 0; i < rows?.Ids.Count; i++) _places.Add(rows.Ids[i], i);
    }

    /// <summary>[vocabulary, width], without what is added.</summary>
    public Tensor Table => _table;

    public TokenRows? Rows => _rows;

    /// <summary>ids I32[tokens] of the batch that came last -> [tokens, width].</summary>
    public Tensor Run(Graph graph, Tensor ids)
    {
        Tensor y = graph.Run(_lookUp, _table, ids);
        if (_low is not null)
            y = graph.Run(_add!, y,
                graph.Run(s_linear, graph.Run(s_plain, _low.A, ids), _low.B));
        return _rows is null || !_slots.Exists ? y
            : graph.Run(s_splice, y, graph.Run(_lookUp, _rows.Values, _which), _slots);
    }

    public long Count(Batch batch) => _rows is null ? 0 : 2L * batch.Tokens.Count;

    public void Load(Batch batch, BatchUpload upload)
    {
        _slots = _which = Tensor.None;
        if (_rows is null) return;
        Growing<int> found = upload.Scratch;
        found.Clear();
        ReadOnlySpan<int> tokens = batch.Tokens.Span;
        for (int t = 0; t < tokens.Length; t++)
            if (_places.ContainsKey(tokens[t])) found.Add(t);
        if (found.Count == 0) return;
        _slots = upload.Ints(found.Span, "places of trained tokens");
        found.Clear();
        foreach (int token in tokens)
            if (_places.TryGetValue(token, out int row)) found.Add(row);
        _which = upload.Ints(found.Span, "trained tokens");
    }
}

/// <summary>
/// The product of the rows that logits are made of with the vocabulary, alone or as a part of the
/// loss, with what an adapter adds to it: h drop(x) A^T B^T, or for tokens with rows of their own
/// the difference, which is the same with A their change and B a one at each token's place.
/// </summary>
public sealed class OutputHead
{
    private static readonly Linear s_linear = new();
    private static readonly Add s_minus = new(-1);

    private readonly Tensor _vocabulary, _second;
    private readonly CrossEntropy _loss = new();
    private readonly LowRankPart? _low;
    private readonly LoraDown? _down;
    private readonly Add? _add;
    private readonly TokenRows? _rows;

    /// <param name="vocabulary">[vocabulary, width].</param>
    /// <param name="low">Its adapter, or null.</param>
    /// <param name="rows">Rows of its own, or null.</param>
    /// <param name="places">[vocabulary, n], a one in each column at its row's token; none without
    /// rows.</param>
    public OutputHead(Tensor vocabulary, LowRankPart? low, TokenRows? rows, Tensor places)
    {
        (_vocabulary, _low, _rows) = (vocabulary, low, rows);
        _second = low is null ? places : low.B;
        if (low is not null) _down = new LoraDown(low.Adapter.Index, low.Dropout);
        if (low is null && rows is null) return;
        _loss = new CrossEntropy(low?.Adapter.Scale ?? 1);
        _add = new Add(low?.Adapter.Scale ?? 1);
    }

    /// <summary>Whether it is the table's matrix, and that is trained.</summary>
    public bool IsTrainedWith(Tensor table, TokenRows? rows) =>
        (_vocabulary.Variable != 0 && _vocabulary.Variable == table.Variable)
        || (_rows is not null && rows is not null && _rows.Values.Variable == rows.Values.Variable);

    /// <summary>See <see cref="Decoder.Loss"/>.</summary>
    public Tensor Loss(
        Graph graph, Tensor hidden, Tensor labelRows, Tensor targets, Span<Tensor> perRow)
    {
        ReadOnlySpan<Tensor> inputs = _second.Exists
            ? [hidden, _vocabulary, labelRows, targets, First(graph, hidden), _second]
            : [hidden, _vocabulary, labelRows, targets];
        return perRow.IsEmpty ? graph.Run(_loss, inputs) : graph.Run(_loss, perRow, inputs);
    }

    /// <summary>h[rows, width] -> logits[rows, vocabulary].</summary>
    public Tensor Logits(Graph graph, Tensor hidden)
    {
        Tensor logits = graph.Run(s_linear, hidden, _vocabulary);
        return !_second.Exists ? logits : graph.Run(_add!, logits,
            graph.Run(s_linear, First(graph, hidden), _second));
    }

    private Tensor First(Graph graph, Tensor hidden) => _down is not null
        ? graph.Run(_down, hidden, _low!.A)
        : graph.Run(s_linear, hidden, graph.Run(s_minus, _rows!.Values, _rows.Original));
}
