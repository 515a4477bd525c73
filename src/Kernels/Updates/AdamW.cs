namespace MiniCpmNative.Kernels.Updates;

/// <summary>
/// One step of AdamW over one flat range, Loshchilov and Hutter 2019, in torch.optim.AdamW's form:
/// p *= 1 - lr * decay;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
/// p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + epsilon),  with g the gradient times the
/// clipping factor and t = Step from 1. Seed keys the rounding of 16-bit moments; see
/// <see cref="AdamWRange"/>.
/// </summary>
public readonly record struct AdamW(
    double LearningRate, double Beta1, double Beta2, double Epsilon, double WeightDecay, long Step,
    ulong Seed = 0)
{
    /// <summary>The layer number of the random numbers; those of dropout and of adapters' start are
    /// small, or small below 2^32.</summary>
    internal const uint RandomLayer = 0x80000000;

    /// <summary>
    /// The formula's factors, in double: p keep - m / (sqrt(v) / root + epsilon) rate.
    /// </summary>
    internal (double Keep, double NewFirst, double NewSecond, double Rate,
        double Root) Factors() => (
        1 - (LearningRate * WeightDecay), 1 - Beta1, 1 - Beta2,
        LearningRate / (1 - Math.Pow(Beta1, Step)), Math.Sqrt(1 - Math.Pow(Beta2, Step)));
}

/// <summary>
/// The tensors of one range, all of one shape. Weights are F32, or BF16 or F16 with a Master in F32
/// of which they are the rounded copy; Gradient is F32. M and V are F32, or BF16, which halves
/// them: then they are rounded up or down at random, so that the many small changes of a moving
/// average are kept on average (the nearest value would be the old one for ever). The random
/// numbers are those of <see cref="Philox"/> for (Seed, Step) of the step and element First + i, so
/// that the same run rounds the same way; m takes the low half of the element's word, v the high
/// half. First is a multiple of 4. (All F64 on an F64 device.)
/// </summary>
public readonly record struct AdamWRange(
    Tensor Weights, Tensor Master, Tensor Gradient, Tensor M, Tensor V, long First = 0)
{
    /// <exception cref="ShapeException">Types or shapes do not fit.</exception>
    /// <param name="full">F32, or F64 on an F64 device.</param>
    public void Check(DType full)
    {
        var state = new Spec(full, Weights.Shape);
        Spec moments = full == DType.F32 && M.Type == DType.BF16 ? state.As(DType.BF16) : state;
        Must("gradient", Gradient.Spec, state);
        Must("m", M.Spec, moments);
        Must("v", V.Spec, moments);
        Must("master", Master.Spec, Weights.Type == full ? default : state);
        if (First % 4 != 0) throw new ShapeException($"adamw: first element is {First}, not 4 n");
    }

    private static void Must(string name, Spec got, Spec expected)
    {
        if (got != expected)
            throw new ShapeException($"adamw: {name} must be {expected}, got {got}");
    }
}
