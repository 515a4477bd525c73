namespace MiniCpmNative.Kernels.Updates;

/// <summary>What an optimizer is: its rule, and what it keeps of each trained tensor, and
/// where.</summary>
/// <param name="Rule">How it changes values.</param>
/// <param name="Moments">F32; BF16; or U8, but for tensors of less than 4,096 elements and
/// embeddings, which have F32, as with bitsandbytes and the Hugging Face Trainer.</param>
/// <param name="Paged">Whether that lies in the host's memory.</param>
public sealed record OptimizerForm(
    UpdateRule Rule = UpdateRule.AdamW, DType Moments = DType.F32, bool Paged = false)
{
    private const int Fewest8Bit = 4096;

    /// <summary>Elements that the places of tensors in the ranges are multiples of.</summary>
    public int Alignment => Moments == DType.U8 ? DynamicMap.Block : 32;

    /// <summary>The type of a tensor's moments.</summary>
    public DType MomentsOf(Shape shape, bool isEmbedding) =>
        Moments == DType.U8 && (shape.Count < Fewest8Bit || isEmbedding) ? DType.F32 : Moments;

    /// <summary>Whether tensors are updated one by one, not all of a range together.</summary>
    public bool IsPerTensor => Rule == UpdateRule.Adafactor;

    /// <summary>What is kept of a tensor, by name: its moments, then the scales of each.</summary>
    public IEnumerable<(string Name, Spec Spec)> StatesOf(DType moments, Shape shape)
    {
        if (Rule == UpdateRule.Adafactor)
        {
            AdafactorSizes sizes = AdafactorSizes.Of(shape);
            yield return (sizes.OfColumns is null ? "second_moment" : "row_moment",
                new(moments, sizes.OfRows));
            if (sizes.OfColumns is { } columns)
                yield return ("column_moment", new(moments, columns));
            yield break;
        }

        string[] names = Rule switch
        {
            UpdateRule.Sgd => [],
            UpdateRule.Lion => ["first"],
            _ => ["first", "second"],
        };
        var scales = new Spec(DType.F32, new Shape(DynamicMap.Blocks(shape.Count)));
        foreach (string name in names) yield return (name + "_moment", new(moments, shape));
        if (moments != DType.U8) yield break;
        foreach (string name in names) yield return (name + "_scales", scales);
    }

    /// <summary>
    /// Values and gradients with states of theirs, in the order of <see cref="StatesOf"/>.
    /// </summary>
    public static UpdateRange Range(
        Tensor weights, Tensor masters, Tensor gradients, long first, ReadOnlySpan<Tensor> states)
    {
        int count = states.Length > 0 && states[0].Type == DType.U8
            ? states.Length / 2 : states.Length;
        ReadOnlySpan<Tensor> moments = states[..count], scales = states[count..];
        return new(weights, masters, gradients, At(moments, 0), At(moments, 1), first,
            At(scales, 0), At(scales, 1));

        static Tensor At(ReadOnlySpan<Tensor> tensors, int index) =>
            index < tensors.Length ? tensors[index] : Tensor.None;
    }
}
