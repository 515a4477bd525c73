using System.Numerics.Tensors;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// scale * B[outputs, rank] A[rank, inputs] on the host, to be added to a weight some rows at a
/// time; norms are those that rows have with it (DoRA), or null.
/// </summary>
/// <param name="a">A, of several weights behind each other.</param>
/// <param name="b">B likewise.</param>
/// <param name="rank">The rank.</param>
/// <param name="inputs">Columns of the weight.</param>
/// <param name="scale">The factor.</param>
/// <param name="norms">Of its rows, or null.</param>
/// <param name="each">Rows of one of several weights; 0 where there is one.</param>
internal sealed unsafe class LowRank(
    float[] a, float[] b, int rank, int inputs, float scale, float[]? norms = null, int each = 0)
{
    public float[] A { get; } = a;

    public float[] B { get; } = b;

    /// <param name="begin">Where in the weight rows begin, in elements; a whole row.</param>
    /// <param name="rows">Whole rows.</param>
    public void Add(long begin, Span<float> rows)
    {
        fixed (float* target = rows)
            Add((int)(begin / inputs), target, rows.Length / inputs);
    }

    /// <summary>The same at a first row, to so many.</summary>
    public void Add(int first, float* rows, int count) => Parallel.For(0, count, row =>
    {
        var sum = new float[inputs];
        int own = each > 0 ? (first + row) / each * rank : 0;
        for (int k = 0; k < rank; k++)
            TensorPrimitives.MultiplyAdd(
                A.AsSpan((own + k) * inputs, inputs), B[((first + row) * rank) + k], sum, sum);
        var values = new Span<float>(rows + ((long)row * inputs), inputs);
        TensorPrimitives.MultiplyAdd(sum, scale, values, values);
        if (norms is not null)
            TensorPrimitives.Multiply(values,
                norms[first + row] / TensorPrimitives.Norm<float>(values), values);
    });
}
