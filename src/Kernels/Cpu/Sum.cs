using System.Numerics;
using System.Numerics.Tensors;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>Sums in a fixed order, so that results do not depend on threads.</summary>
public static unsafe class Sum
{
    private const int GroupRows = 64;

    /// <summary>into[c] = sum over rows of x[r, c], or adds it; on the calling thread.</summary>
    public static void Rows<T>(Matrix<T> x, Gradient<T> into)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Span<T> sum = into.Into.RowSpan(0);
        if (!into.Accumulate) sum.Clear();
        for (int r = 0; r < x.Rows; r++) TensorPrimitives.Add<T>(sum, x.RowSpan(r), sum);
    }

    /// <summary>
    /// The same over many rows, on all threads, if the gradient is wanted: a bias gradient.
    /// </summary>
    public static void Rows<T>(in CpuCall<T> call, Matrix<T> x, Gradient<T> into)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (!into.Wanted) return;
        int groups = (x.Rows + GroupRows - 1) / GroupRows;
        Matrix<T> partial = call.Scratch(new Shape(groups, x.Cols));
        call.Workers.For(groups, new Groups<T>(x, partial));
        Rows(partial, into);
    }

    /// <summary>Sum of (x[i] - centre)^2.</summary>
    public static T SquaredDistances<T>(T* x, T centre, int count)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        int width = Vector<T>.Count, i = 0;
        Vector<T> middle = Vector.Create(centre), sum = default, other = default;
        for (; i <= count - (2 * width); i += 2 * width)
        {
            Vector<T> a = Vector.Load(x + i) - middle, b = Vector.Load(x + i + width) - middle;
            sum += a * a;
            other += b * b;
        }

        T total = Vector.Sum(sum + other);
        for (; i < count; i++) total += (x[i] - centre) * (x[i] - centre);
        return total;
    }

    /// <summary>sum = sum of w * dy, pull = sum of w * dy * (x - centre).</summary>
    public static void Weighted<T>(T* w, T* dy, T* x, T centre, int count, out T sum, out T pull)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        int width = Vector<T>.Count, i = 0;
        Vector<T> middle = Vector.Create(centre), sums = default, pulls = default;
        for (; i <= count - width; i += width)
        {
            Vector<T> g = Vector.Load(w + i) * Vector.Load(dy + i);
            sums += g;
            pulls += g * (Vector.Load(x + i) - middle);
        }

        (sum, pull) = (Vector.Sum(sums), Vector.Sum(pulls));
        for (; i < count; i++)
        {
            T g = w[i] * dy[i];
            sum += g;
            pull += g * (x[i] - centre);
        }
    }

    private readonly struct Groups<T>(Matrix<T> x, Matrix<T> partial) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int group = begin; group < end; group++)
            {
                int first = group * GroupRows, last = Math.Min(x.Rows, first + GroupRows);
                Span<T> sum = partial.RowSpan(group);
                x.RowSpan(first).CopyTo(sum);
                for (int r = first + 1; r < last; r++)
                    TensorPrimitives.Add<T>(sum, x.RowSpan(r), sum);
            }
        }
    }
}
