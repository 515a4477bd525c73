using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// cache[slots[i]] = x[i], in place: the keys or values of a step behind those already there, for
/// <see cref="Attention"/> over a cache. cache[room, cols] in the type of activations, x[tokens,
/// cols], slots I32[tokens] rising. There is no gradient, and the output is empty: the operation
/// runs for its effect. With several sequences each has rows of the cache to itself.
/// </summary>
/// <exception cref="ShapeException">
/// A shape or type does not fit, or slots do not rise within the cache.
/// </exception>
public sealed record CacheAppend() : Op("cache_append")
{
    private static readonly Shape s_empty = new(0);

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec cache = inputs.FloatMatrix(this, 0, "cache"), x = inputs.Float(this, 1, "x");
        if (cache.Type != activations) throw this.Wrong("cache", $"of {activations}", cache);
        x.MustBe(this, "x", checked((int)x.Shape.Rows), cache.Shape.Cols);
        inputs.Int(this, 2, "slots").MustBe(this, "slots", (int)x.Shape.Rows);
        return new(new Spec(activations, s_empty));
    }

    public override bool Differentiates(int input) => false;

    public override int? Writes => 0;

    public override void CpuForward<T>(in CpuCall<T> call)
    {
        Matrix<T> cache = call.In(0), x = call.In(1);
        Matrix<int> slots = call.Ints(2);
        for (int i = 0; i < x.Rows; i++)
            if (slots[i] >= cache.Rows || slots[i] <= (i == 0 ? -1 : slots[i - 1]))
                throw new ShapeException($"{Name}: slots[{i}] is {slots[i]}, expected rising rows "
                    + $"of the cache below {cache.Rows}");
        for (int i = 0; i < x.Rows; i++) x.RowSpan(i).CopyTo(cache.RowSpan(slots[i]));
    }

    public override void CudaForward(in CudaCall call)
    {
        Tensor cache = call.Input(0), x = call.In(1);
        call.Launch("cache_append", Grid.Rows((int)x.Shape.Rows), cache, x, call.Input(2),
            cache.Shape[0], x.Shape.Cols, call.Faults);
    }

    public override void CpuBackward<T>(in CpuCall<T> call)
    {
    }

    public override void CudaBackward(in CudaCall call)
    {
    }
}
