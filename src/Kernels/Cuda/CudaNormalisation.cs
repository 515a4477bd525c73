namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Row normalisation, as LayerNorm has it and, with mean and b left out, RMSNorm: one pair of
/// kernels serves both, as on the CPU. Inputs are x, w and perhaps b.
/// </summary>
internal static class CudaNormalisation
{
    // Rows per partial sum of dw and db, and the most of such sums: they are added in order, by a
    // thread per column.
    private const int PartRows = 64, MaxParts = 64;

    public static void Forward(in CudaCall call, in Tensor mean, in Tensor rstd, double epsilon,
        double weightCentre = 0)
    {
        Tensor x = call.In(0);
        call.Launch("norm_forward", Grid.Rows((int)x.Shape.Rows, x.Shape.Cols, call.Real),
            call.Output, mean, rstd, x, call.Floats(1), call.Floats(2), x.Shape.Cols, epsilon,
            weightCentre);
    }

    // The gradients of w and b read x and dy once more;
    // where weights are frozen nobody pays for that.
    public static void Backward(
        in CudaCall call, in Tensor mean, in Tensor rstd, double weightCentre = 0)
    {
        GradientTarget dx = call.Gradient(0), dw = call.FloatGradient(1),
            db = call.FloatGradient(2);
        Tensor x = call.In(0), dy = call.OutputGradient;
        int rows = (int)x.Shape.Rows, cols = x.Shape.Cols;
        if (dx.Wanted)
            call.Launch("norm_backward", Grid.Rows(rows, cols, call.Real),
                dx.Buffer, dy, x, call.Floats(1), mean, rstd, cols, dx.Accumulate,
                weightCentre);
        if (!dw.Wanted && !db.Wanted) return;
        int partRows = Math.Max(PartRows, (rows + MaxParts - 1) / MaxParts);
        int parts = (rows + partRows - 1) / partRows;
        Tensor dwPart = dw.Wanted ? call.Scratch(DType.F32, parts, cols) : Tensor.None;
        Tensor dbPart = db.Wanted ? call.Scratch(DType.F32, parts, cols) : Tensor.None;
        call.Launch("norm_weight_parts", Grid.Tiles(cols, parts, call.Real),
            dwPart, dbPart, dy, x, mean, rstd, rows, cols, partRows);
        if (dw.Wanted) call.SumParts(dwPart, dw);
        if (db.Wanted) call.SumParts(dbPart, db);
    }
}
