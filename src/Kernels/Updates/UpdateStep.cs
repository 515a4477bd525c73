namespace MiniCpmNative.Kernels.Updates;

/// <summary>How an optimizer changes values; g is the gradient times the clipping factor.</summary>
public enum UpdateRule : byte
{
    /// <summary>
    /// Loshchilov and Hutter 2019, in torch.optim.AdamW's form: p *= 1 - lr * decay;
    /// m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
    /// p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + epsilon).
    /// </summary>
    AdamW,

    /// <summary>As AdamW, with the decay after the change, as bitsandbytes' kernels have
    /// it.</summary>
    AdamWDecaysLast,

    /// <summary>
    /// Chen et al. 2023: p = p (1 - lr decay) - lr sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g.
    /// </summary>
    Lion,

    /// <summary>p = p (1 - lr decay) - lr g: torch.optim.SGD without momentum.</summary>
    Sgd,

    /// <summary>
    /// Shazeer and Stern 2018, tensor by tensor, as transformers' class with a given rate (no
    /// relative step, no scale of the parameter, no first moment), g^2 with 1e-30 added, s = 1 -
    /// t^-0.8: of matrices, the last two axes, r = s r + (1 - s) mean of g^2 over a row, c the same
    /// over a column, u = g / sqrt(r / mean(r)) / sqrt(c); of vectors v = s v + (1 - s) g^2,
    /// u = g / sqrt(v); p = p (1 - lr decay) - lr u / max(1, rms(u)).
    /// </summary>
    Adafactor,
}

/// <summary>
/// One step of an optimizer over one flat range, t = Step from 1. Seed keys the rounding of 16-bit
/// moments; see <see cref="UpdateRange"/>.
/// </summary>
public readonly record struct UpdateStep(
    double LearningRate, double Beta1, double Beta2, double Epsilon, double WeightDecay, long Step,
    ulong Seed = 0, UpdateRule Rule = UpdateRule.AdamW)
{
    /// <summary>The layer number of the random numbers; those of dropout and of adapters' start are
    /// small, or small below 2^32.</summary>
    internal const uint RandomLayer = 0x80000000;

    /// <summary>Of Adafactor: what is added to squares, and the largest rms of a change.</summary>
    internal const double LeastSquare = 1e-30, MostChange = 1;

    /// <summary>Adafactor's decay of the means of squares: none is left of the first.</summary>
    internal double SecondDecay => 1 - Math.Pow(Step, -0.8);

    /// <summary>
    /// The formulas' factors, in double: p keep - m / (sqrt(v) / root + epsilon) rate, and
    /// p keep - sign or g rate. A decay that comes last is one of both terms. With moments of 8
    /// bits 1 - b is that of 32-bit numbers, as in bitsandbytes' kernels: for 0.999 it is 1.3e-5
    /// off.
    /// </summary>
    internal (double Keep, double NewFirst, double NewSecond, double Rate, double Root) Factors(
        DType moments)
    {
        double keep = 1 - (LearningRate * WeightDecay);
        bool isAdam = Rule is UpdateRule.AdamW or UpdateRule.AdamWDecaysLast;
        double rate = isAdam ? LearningRate / (1 - Math.Pow(Beta1, Step)) : LearningRate;
        return (keep, Rest(Beta1), Rest(Beta2),
            Rule == UpdateRule.AdamWDecaysLast ? rate * keep : rate,
            isAdam ? Math.Sqrt(1 - Math.Pow(Beta2, Step)) : 1);

        double Rest(double beta) => moments == DType.U8 ? 1f - (float)beta : 1 - beta;
    }
}

/// <summary>
/// The tensors of one range, all of one shape. Weights are F32, or BF16 or F16 with a Master in F32
/// of which they are the rounded copy; Gradient is F32. M and V, as many of them as the rule has,
/// are F32; or BF16, which halves them: then they are rounded up or down at random, so that the
/// many small changes of a moving average are kept on average (the nearest value would be the old
/// one for ever). The random numbers are those of <see cref="Philox"/> for (Seed, Step) of the step
/// and element First + i, so that the same run rounds the same way; m takes the low half of the
/// element's word, v the high half. First is a multiple of 4. Or they are U8, codes of
/// <see cref="DynamicMap"/> with a scale in MScales and VScales for every
/// <see cref="DynamicMap.Block"/> elements from the range's first on. Of Adafactor the range is one
/// tensor, M is what it keeps of rows or of a vector, V of columns. (All F64 on an F64 device.)
/// </summary>
public readonly record struct UpdateRange(
    Tensor Weights, Tensor Master, Tensor Gradient, Tensor M, Tensor V, long First = 0,
    Tensor MScales = default, Tensor VScales = default)
{
    /// <exception cref="ShapeException">Types or shapes do not fit.</exception>
    /// <param name="full">F32, or F64 on an F64 device.</param>
    /// <param name="rule">Says which moments there are.</param>
    public void Check(DType full, UpdateRule rule)
    {
        var state = new Spec(full, Weights.Shape);
        if (rule == UpdateRule.Adafactor)
        {
            AdafactorSizes sizes = AdafactorSizes.Of(Weights.Shape);
            Must("gradient", Gradient.Spec, state);
            Must("m", M.Spec, new(full, sizes.OfRows));
            Must("v", V.Spec, sizes.OfColumns is { } columns ? new(full, columns) : default);
            Must("master", Master.Spec, Weights.Type == full ? default : state);
            return;
        }

        bool isAdam = rule is UpdateRule.AdamW or UpdateRule.AdamWDecaysLast;
        DType type = full == DType.F32 && ((isAdam && M.Type == DType.BF16)
            || (rule != UpdateRule.Sgd && M.Type == DType.U8)) ? M.Type : full;
        Spec moments = state.As(type);
        Spec scales = type != DType.U8 ? default
            : new(full, new Shape(DynamicMap.Blocks(Weights.Shape.Count)));
        Must("gradient", Gradient.Spec, state);
        Must("m", M.Spec, rule == UpdateRule.Sgd ? default : moments);
        Must("v", V.Spec, isAdam ? moments : default);
        Must("scales of m", MScales.Spec, scales);
        Must("scales of v", VScales.Spec, isAdam ? scales : default);
        Must("master", Master.Spec, Weights.Type == full ? default : state);
        if (First % 4 != 0) throw new ShapeException($"update: first element is {First}, not 4 n");
    }

    private static void Must(string name, Spec got, Spec expected)
    {
        if (got != expected)
            throw new ShapeException($"update: {name} must be {expected}, got {got}");
    }
}

/// <summary>
/// A tensor as Adafactor sees it: matrices of its last two axes, or a vector as a matrix of one
/// row.
/// </summary>
/// <param name="OfRows">The shape of what is kept of rows, or of a vector.</param>
/// <param name="OfColumns">Of columns; null for a vector.</param>
public readonly record struct AdafactorSizes(
    int Batch, int Rows, int Cols, Shape OfRows, Shape? OfColumns)
{
    public static AdafactorSizes Of(Shape shape)
    {
        if (shape.Rank < 2) return new(1, 1, checked((int)shape.Count), shape, null);
        Span<int> axes = stackalloc int[shape.Rank];
        for (int axis = 0; axis < axes.Length; axis++) axes[axis] = shape[axis];
        var ofRows = new Shape(axes[..^1]);
        (int rows, int cols) = (axes[^2], axes[^1]);
        axes[^2] = cols;
        return new(checked((int)(shape.Rows / Math.Max(1, rows))), rows, cols, ofRows,
            new Shape(axes[..^1]));
    }
}
