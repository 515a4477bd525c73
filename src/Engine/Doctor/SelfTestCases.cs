using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Doctor;

/// <summary>
/// An input of a self-test: numbers of the activations' type, a parameter, or integers. A parameter
/// may be stored in another type than activations.
/// </summary>
internal sealed record Operand(
    string Name, int[] Shape, int[]? Ints = null, bool IsParameter = false,
    bool IsOtherType = false)
{
    /// <summary>An optional input that is not given.</summary>
    public static Operand Absent { get; } = new("", []);

    public bool Exists => Shape.Length > 0;

    public Spec Spec(DType activations) => new(TypeOf(activations), new Shape(Shape));

    private DType TypeOf(DType activations) => Ints is not null ? DType.I32
        : !IsOtherType || activations == DType.F64 ? activations
        : activations == DType.F32 ? DType.BF16 : DType.F32;
}

/// <summary>An operation and its inputs.</summary>
internal sealed record SelfTestCase(Op Op, params Operand[] Inputs);

/// <summary>
/// The self-test's operations: each at a size whose rows are multiples of 16 bytes and at one whose
/// rows are not, since devices run different code for the two; attention at every head dimension
/// that has code of its own, and at one that has none.
/// </summary>
internal static class SelfTestCases
{
    private const int Tokens = 70, Vocabulary = 90;

    public static IEnumerable<SelfTestCase> All =>
    [
        .. Sized(64), .. Sized(15), .. Sized(1280),
        .. new[] { 64, 72, 128, 10 }.SelectMany(Attentions),
    ];

    private static IEnumerable<SelfTestCase> Sized(int cols)
    {
        Operand x = X("x", Tokens, cols), like = X("like", Tokens, cols), w = P("w", cols);
        Operand table = P("table", Vocabulary, cols), ids = Ids("ids", Tokens, Vocabulary);
        Operand matrix = P("w", 24, cols), bias = P("b", 24);
        int half = cols / 2, angles = 9;
        yield return new(new RmsNorm(1e-6), x, w);
        yield return new(new LayerNorm(1e-6), x, w, P("b", cols));
        yield return new(new Gelu(GeluKind.Tanh), x);
        yield return new(new Gelu(GeluKind.Erf), x);
        yield return new(new SwiGlu(), x, like);
        yield return new(new Add(0.5), x, like);
        yield return new(new Scale(0.5), x);
        yield return new(new Columns(cols / 4, cols / 2), x);
        yield return new(
            new Rope(2 * half), X("x", Tokens, 2 * half), Ids("positions", Tokens, angles),
            X("cos", angles, half), X("sin", angles, half));
        yield return new(new Embedding(2), table, ids);
        yield return new(new PositionGather(), x, table, ids);
        int[] starts = [.. Enumerable.Range(0, Tokens + 1).Select(i => i * 3)];
        yield return new(
            new WeightedGather(), x, table, Ints("starts", starts),
            Ids("ids", 3 * Tokens, Vocabulary), X("weights", 3 * Tokens));
        yield return new(
            new CacheAppend(), X("cache", 2 * Tokens, cols), x,
            Ints("slots", [.. Enumerable.Range(0, Tokens).Select(i => 2 * i)]));
        int[] slots = [.. Enumerable.Range(0, 20).Select(i => 3 * i)];
        yield return new(new Splice(), x, X("features", 20, cols), Ints("positions", slots));
        yield return new(new Linear(), x, matrix, bias);
        yield return new(new Linear(), x, matrix with { IsOtherType = true }, bias);
        yield return new(new Linear(Transposed: true), x, P("w", cols, 24), Operand.Absent);
        foreach (double dropout in (double[])[0, 0.25])
            foreach (int rank in (int[])[8, 5])
                yield return new(
                    new LoraLinear(1, 2, dropout), x, matrix, bias, P("a", rank, cols),
                    P("bb", 24, rank));
        int[] rows = [.. Enumerable.Range(0, 33).Select(i => 2 * i)];
        yield return new(
            new CrossEntropy(), x, P("w", Vocabulary, cols), Ints("rows", rows),
            Ids("targets", rows.Length, Vocabulary));
    }

    private static IEnumerable<SelfTestCase> Attentions(int headDim)
    {
        const int Heads = 4, KvHeads = 2;
        foreach (bool causal in (bool[])[true, false])
            yield return new(
                new Attention(Heads, KvHeads, headDim, causal, 1 / Math.Sqrt(headDim)),
                X("q", 150, Heads * headDim), X("k", 150, KvHeads * headDim),
                X("v", 150, KvHeads * headDim), Ints("cu_seqlens_q", 0, 17, 150),
                Ints("cu_seqlens_k", 0, 17, 150), Ints("key_lengths", 17, causal ? 133 : 100));
    }

    private static Operand X(string name, params int[] shape) => new(name, shape);

    private static Operand P(string name, params int[] shape) =>
        new(name, shape, IsParameter: true);

    private static Operand Ints(string name, params int[] values) =>
        new(name, [values.Length], values);

    private static Operand Ids(string name, int count, int limit) =>
        Ints(name, [.. Enumerable.Range(0, count).Select(i => i * 37 % limit)]);
}
