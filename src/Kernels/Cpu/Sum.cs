using System.Numerics;
using System.Numerics.Tensors;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>Sums in a fixed order, so that results do not depend on threads.</summary>
public static class Sum
{
    /// <summary>into[c] = sum over rows of x[r, c], or adds it: the end of every gradient of a vector.</summary>
    public static void Rows<T>(Matrix<T> x, Gradient<T> into)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Span<T> sum = into.Into.RowSpan(0);
        if (!into.Accumulate) sum.Clear();
        for (int r = 0; r < x.Rows; r++) TensorPrimitives.Add<T>(sum, x.RowSpan(r), sum);
    }
}
