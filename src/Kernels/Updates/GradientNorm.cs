namespace MiniCpmNative.Kernels.Updates;

/// <summary>
/// The global norm of gradients, and what follows from it, as a device tensor of
/// <see cref="Spec"/>: norm = sqrt(sum of g^2) over all ranges, accumulated in double in a fixed
/// order; factor = min(1, maxNorm / (norm + 1e-6)) as torch.nn.utils.clip_grad_norm_ has it; and
/// the number of elements that are NaN or infinite, those of the step's losses included. On the
/// device, so that a step need not wait for the host.
/// </summary>
public readonly record struct GradientNorm(double Norm, double Factor, double NonFinite)
{
    /// <summary>F64[3]: norm, factor, number of non-finite elements.</summary>
    public static Spec Spec { get; } = new(DType.F64, new Shape(3));

    internal static GradientNorm Of(double squares, double nonFinite, double maxNorm)
    {
        double norm = Math.Sqrt(squares);
        double factor = maxNorm > 0 ? Math.Min(1, maxNorm / (norm + 1e-6)) : 1;
        return new(norm, factor, nonFinite);
    }
}
