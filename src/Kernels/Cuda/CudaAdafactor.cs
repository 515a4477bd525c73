using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The GPU's Adafactor, kernels `adafactor_*`: means of rows and, in parts of fixed size, of
/// columns; the size of the change; the change. The gradient is read in each of them.
/// </summary>
internal static class CudaAdafactor
{
    private const int RowsPerPart = 256;

    public static void Run(
        CudaDevice device, in UpdateStep step, in UpdateRange range, in Tensor norm)
    {
        var (batch, rows, cols, _, _) = AdafactorSizes.Of(range.Weights.Shape);
        int all = checked(batch * rows), parts = (rows + RowsPerPart - 1) / RowsPerPart;
        Tensor p = range.Weights, rounded = Tensor.None, g = range.Gradient;
        if (range.Master.Exists) (p, rounded) = (range.Master, range.Weights);
        double second = step.SecondDecay, least = UpdateStep.LeastSquare;
        ArenaMark mark = device.Step.Mark();
        Tensor New(DType type, params ReadOnlySpan<int> sizes) =>
            device.Step.Push(new Spec(type, new Shape(sizes)), "adafactor");
        Tensor squares = New(DType.F64, all), rate = New(DType.F32, 1), means = Tensor.None;
        device.Launch("adafactor_rows", Grid.Rows(all),
            [range.M, g, norm, cols, !range.V.Exists, second, 1 - second, least]);
        if (range.V.Exists)
        {
            means = New(DType.F32, batch);
            Tensor sums = New(DType.F32, batch, parts, cols);
            device.Launch("adafactor_column_parts",
                Grid.Blocks256((cols + 255) / 256, parts, batch),
                [sums, g, rows, cols, RowsPerPart]);
            device.Launch("adafactor_columns", Grid.Elements((long)batch * cols),
                [range.V, sums, norm, batch, rows, cols, parts, second, 1 - second, least]);
            device.Launch("adafactor_means", Grid.Rows(batch), [means, range.M, rows]);
        }

        device.Launch("adafactor_squares", Grid.Rows(all),
            [squares, g, range.M, range.V, means, norm, rows, cols]);
        device.Launch("adafactor_rate", new Grid(1, 256),
            [rate, squares, norm, all, range.Weights.Shape.Count, step.LearningRate,
                UpdateStep.MostChange]);
        device.Launch("adafactor_change", Grid.Rows(all),
            [p, rounded, (int)rounded.Type, g, range.M, range.V, means, rate, norm, rows, cols,
                1 - (step.LearningRate * step.WeightDecay)]);
        device.Step.Pop(mark);
    }
}
