using MiniCpmNative.Engine.Weights;

namespace MiniCpmNative.Engine.Export;

/// <summary>How the reader wants a stored tensor otherwise than it is.</summary>
/// <param name="Rows">Which stored row each row is: all of them in another order, or
/// some.</param>
/// <param name="Columns">Which stored column each column is.</param>
/// <param name="Value">What becomes of each value.</param>
internal sealed record GgufChange(
    int[]? Rows = null, int[]? Columns = null, Func<float, float>? Value = null)
{
    public static GgufChange None { get; } = new();
}

/// <summary>
/// The tensors of a GGUF file, made of a model's weights piece by piece: vectors in F32, matrices
/// in the type that is asked for, or in F16 where a row is no whole number of its blocks.
/// </summary>
internal sealed class GgufTensors(MergedWeights weights)
{
    private const int PieceElements = 1 << 20;

    public List<GgufTensor> All { get; } = [];

    /// <summary>A stored tensor, changed where the reader wants it otherwise.</summary>
    public void Add(string name, string stored, GgufType type, GgufChange? change = null) =>
        AddStored(name, stored, type, change ?? GgufChange.None);

    /// <summary>A stored tensor as that of another name, with what an adapter does to that
    /// one.</summary>
    public void AddAs(string other, string name, string stored, GgufType type) =>
        AddStored(name, stored, type, GgufChange.None, other);

    /// <summary>A square matrix with rows and columns exchanged.</summary>
    public void AddTransposed(string name, string stored, GgufType type)
    {
        StoredTensor tensor = weights.Checkpoint.Get(stored);
        int side = (int)tensor.Sizes[0];
        All.Add(new GgufTensor(name, type, tensor.Sizes, stream =>
        {
            float[] values = new float[tensor.Count], turned = new float[tensor.Count];
            weights.Read(tensor, 0, values, turned);
            for (int r = 0; r < side; r++)
                for (int c = 0; c < side; c++) turned[(c * side) + r] = values[(r * side) + c];
            Write(stream, type, turned, stored);
        }));
    }

    /// <summary>Numbers that no tensor of the model has.</summary>
    public void Add(string name, float[] values, params IReadOnlyList<long> sizes) =>
        All.Add(new GgufTensor(name, GgufType.F32, sizes,
            stream => Write(stream, GgufType.F32, values, name)));

    private void AddStored(
        string name, string stored, GgufType type, GgufChange change, string? other = null)
    {
        StoredTensor tensor = weights.Checkpoint.Get(stored);
        if (other is not null) tensor = tensor.As(other);
        // Axes of one in front of the last say nothing to the reader.
        long[] sizes = [.. tensor.Sizes.Where((size, axis) =>
            size != 1 || axis == tensor.Sizes.Length - 1)];
        long rows = change.Rows?.Length ?? tensor.Sizes[0];
        int row = checked((int)(tensor.Count / tensor.Sizes[0]));
        if (change.Rows is not null) sizes[0] = rows;
        if (sizes.Length == 1) type = GgufType.F32;
        else if (sizes[^1] % type.Block != 0) type = GgufType.F16;
        All.Add(new GgufTensor(name, type, sizes, stream =>
        {
            int piece = (int)Math.Min(rows, Math.Max(1, PieceElements / row));
            float[] values = new float[piece * row], spare = new float[piece * row];
            for (long done = 0; done < rows; done += piece)
            {
                int count = (int)Math.Min(piece, rows - done), length = count * row;
                Read(tensor, change.Rows, done, count, values, spare);
                if (change.Columns is { } columns)
                {
                    for (int i = 0; i < length; i++)
                        spare[i] = values[(i / row * row) + columns[i % row]];
                    (values, spare) = (spare, values);
                }

                if (change.Value is { } value)
                    for (int i = 0; i < length; i++) values[i] = value(values[i]);
                Write(stream, type, values.AsSpan(0, length), stored);
            }
        }));
    }

    // Rows that follow each other are read at once.
    private void Read(StoredTensor tensor, int[]? order, long begin, int count,
        Span<float> values, Span<float> other)
    {
        int row = checked((int)(tensor.Count / tensor.Sizes[0]));
        for (int i = 0, run; i < count; i += run)
        {
            long first = order?[begin + i] ?? begin + i;
            for (run = 1; i + run < count; run++)
                if (order is not null && order[begin + i + run] != first + run) break;
            weights.Read(tensor, first * row, values.Slice(i * row, run * row),
                other.Slice(i * row, run * row));
        }
    }

    private static void Write(
        Stream stream, GgufType type, ReadOnlySpan<float> values, string stored)
    {
        if (type != GgufType.F32 && type != GgufType.BF16)
            foreach (float value in values)
                if (Math.Abs(value) >= 65520)
                    throw new InputException($"{stored} has the value {value:R}, which F16 does "
                        + "not hold (65504 at most): choose --type bf16");
        int piece = 1 << 16;
        var bytes = new byte[type.Bytes(piece)];
        for (int done = 0; done < values.Length; done += piece)
        {
            ReadOnlySpan<float> part = values.Slice(done, Math.Min(piece, values.Length - done));
            type.Encode(part, bytes);
            stream.Write(bytes, 0, (int)type.Bytes(part.Length));
        }
    }
}
