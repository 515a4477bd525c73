using MiniCpmNative.Engine.Weights;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// The tensors of a GGUF file, made of a model's weights piece by piece: vectors in F32, matrices
/// in the type that is asked for, or in F16 where a row is no whole number of its blocks.
/// </summary>
internal sealed class GgufTensors(MergedWeights weights)
{
    private const int PieceElements = 1 << 20;

    public List<GgufTensor> All { get; } = [];

    /// <summary>A stored tensor as it is.</summary>
    public void Add(string name, string stored, GgufType type) =>
        Add(name, stored, type, 0, 1, null);

    /// <summary>A stored tensor as that of another name, with what an adapter does to that
    /// one.</summary>
    public void AddAs(string other, string name, string stored, GgufType type) =>
        Add(name, stored, type, 0, 1, null, other);

    /// <summary>
    /// Of a stored tensor one of several equal parts, which follow each other along its first axis.
    /// </summary>
    public void AddPart(string name, string stored, GgufType type, int part, int parts) =>
        Add(name, stored, type, part, parts, null);

    /// <summary>
    /// A projection to heads whose halves llama.cpp turns as neighbours: row j of the first half of
    /// a head becomes row 2j, row j of the second 2j + 1.
    /// </summary>
    public void AddInterleaved(string name, string stored, GgufType type, int headDim) =>
        Add(name, stored, type, 0, 1, headDim);

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

    private void Add(
        string name, string stored, GgufType type, int part, int parts, int? headDim,
        string? other = null)
    {
        StoredTensor tensor = weights.Checkpoint.Get(stored);
        if (other is not null) tensor = tensor.As(other);
        // Leading axes of one say nothing to the reader.
        long[] sizes = [.. tensor.Sizes.SkipWhile((size, axis) =>
            size == 1 && axis < tensor.Sizes.Length - 2)];
        sizes[0] /= parts;
        if (sizes.Length == 1) type = GgufType.F32;
        else if (sizes[^1] % type.Block != 0) type = GgufType.F16;
        long count = tensor.Count / parts, begin = count * part;
        All.Add(new GgufTensor(name, type, sizes, stream =>
        {
            // Whole rows of the stored matrix, and whole heads of them.
            int row = checked((int)(tensor.Count / tensor.Sizes[0])), unit = row * (headDim ?? 1);
            int piece = (int)Math.Min(count, Math.Max(1, PieceElements / unit) * (long)unit);
            float[] values = new float[piece], before = new float[piece];
            for (long done = 0; done < count; done += piece)
            {
                int length = (int)Math.Min(piece, count - done);
                weights.Read(tensor, begin + done, values.AsSpan(0, length),
                    before.AsSpan(0, length));
                if (headDim is { } heads)
                {
                    Interleave(values.AsSpan(0, length), before, row, heads);
                    (values, before) = (before, values);
                }

                Write(stream, type, values.AsSpan(0, length), stored);
            }
        }));
    }

    private static void Interleave(ReadOnlySpan<float> from, Span<float> to, int row, int headDim)
    {
        for (int r = 0; r < from.Length / row; r++)
        {
            int head = r / headDim * headDim, at = r % headDim, half = headDim / 2;
            int place = head + (at < half ? 2 * at : (2 * (at - half)) + 1);
            from.Slice(r * row, row).CopyTo(to[(place * row)..]);
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
