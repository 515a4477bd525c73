using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// A sparse mixture of gated feed-forwards: y[r] = sum over the Chosen largest logits e of row r of
/// g[r, e] * W1_e (silu(G_e x[r]) * U_e x[r]), g = softmax of those logits alone, which is the
/// softmax over all experts divided by the chosen ones' sum. x[rows, width], logits[rows, experts],
/// w[experts * 2 inner, width], of each expert G_e, then U_e, w1[experts * width, inner] -> y like
/// x. Saves the <see cref="Routing"/> (I32), g (F32) and, behind each other, the rows of G x and
/// U x in the order of their experts. Of equal logits the first counts as larger; a row with a NaN
/// among its logits becomes NaN. Gradients flow through g, none through the choice.
/// Shazeer et al. 2017, Fedus et al. 2021; Qwen's, by whose code the chosen are made to sum to 1.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, or there are fewer experts than are chosen.
/// </exception>
public sealed record Experts(int Chosen) : Op("experts")
{
    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec x = inputs.FloatMatrix(this, 0, "x"), logits = inputs.FloatMatrix(this, 1, "logits");
        int rows = x.Shape[0], width = x.Shape.Cols, experts = logits.Shape.Cols;
        logits.MustBe(this, "logits", rows, experts);
        if (Chosen < 1 || experts < Chosen)
            throw this.Wrong("logits", $"columns for at least {Chosen} experts", logits);
        Spec w = inputs.FloatMatrix(this, 2, "w"), w1 = inputs.FloatMatrix(this, 3, "w1");
        int inner = w1.Shape.Cols;
        w1.MustBe(this, "w1", checked(experts * width), inner);
        w.MustBe(this, "w", checked(2 * experts * inner), width);
        int terms = checked(rows * Chosen);
        return new(new Spec(activations, x.Shape),
            new Spec(DType.I32, new Shape(new Routing(experts, rows, Chosen).Count)),
            new Spec(activations.Statistics(), new Shape(terms)),
            new Spec(activations, new Shape(checked(2 * terms), inner)));
    }

    public override bool Differentiates(int input) => true;

    // x is a factor of w's gradient alone; of the logits what is saved suffices.
    public override bool BackwardReads(int input, ReadOnlySpan<bool> trained) =>
        input > 1 || (input == 0 && trained[2]);

    public override void CpuForward<T>(in CpuCall<T> call) => CpuExperts.Forward(call, Chosen);

    public override void CpuBackward<T>(in CpuCall<T> call) => CpuExperts.Backward(call, Chosen);

    public override void CudaForward(in CudaCall call) => new CudaExperts(call, Chosen).Forward();

    public override void CudaBackward(in CudaCall call) => new CudaExperts(call, Chosen).Backward();
}

/// <summary>
/// Which rows go to which experts, as the integers of one tensor. A term is one of the rows *
/// chosen pairs of a row and an expert of its choice, row * chosen + rank. By a stable counting
/// sort an expert's terms get places side by side: those of expert e from begins[e] to begins[e +
/// 1] - 1, in the order of their rows.
/// </summary>
/// <param name="Experts">How many there are.</param>
/// <param name="Rows">Rows of the input.</param>
/// <param name="Chosen">Experts of a row.</param>
internal readonly record struct Routing(int Experts, int Rows, int Chosen)
{
    /// <summary>Rows and experts in pairs.</summary>
    public int Terms => checked(Rows * Chosen);

    /// <summary>I32[experts + 1]: where the places of each expert begin, and the end.</summary>
    public static int Begins => 0;

    /// <summary>I32[terms]: the expert of a term.</summary>
    public int ExpertOf => Experts + 1;

    /// <summary>I32[terms]: the term at a place.</summary>
    public int TermAt => ExpertOf + Terms;

    /// <summary>I32[terms]: the place of a term.</summary>
    public int PlaceOf => TermAt + Terms;

    /// <summary>I32[<see cref="MostTiles"/>, 2]: expert and first place of each tile of places, of
    /// a GPU's products; the expert is -1 where there are fewer.</summary>
    public int Tiles => PlaceOf + Terms;

    /// <summary>As many tiles as there can be, whatever is chosen.</summary>
    public int MostTiles => (Terms / KernelConstants.ExpertTileRows) + Math.Min(Experts, Terms);

    /// <summary>All of it.</summary>
    public int Count => checked(Tiles + (2 * MostTiles));
}
