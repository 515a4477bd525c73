using System.Numerics;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Transcendental functions on vectors. The runtime's Exp of floats computes in double; here floats
/// are computed in float, to about 2 ulp, which is what activations
/// and softmax need at twice the speed.
/// </summary>
public static class VectorMath
{
    // erfc(z) exp(z^2) = t * sum_k c_k T_k(2t - 1), t = 1 / (1 + z/2), z >= 0: Chebyshev
    // coefficients computed from that definition in 60 digits. Float needs the first eleven.
    private static readonly double[] s_erfc =
    [
        0.57703373861646969, 0.35543692127049849, 0.065095158828786525,
        0.0036711423958366392, -0.0011128447433526325, -0.0001607582991537808,
        3.2780315741731371e-5, 5.442441645505016e-6, -1.5154665553171482e-6,
        -1.4297608181169865e-7, 8.2346088274194934e-8, -1.2962846852306563e-9,
        -4.1547216310151983e-9, 6.3470582783628112e-10, 1.4320822712256224e-10,
        -6.1603901052045855e-11, 2.0612138554721696e-12, 3.5714931488477044e-12,
        -8.5864228432517965e-13, -6.1456002137906306e-14, 7.4187257485966171e-14,
        -1.2895042755032326e-14, -2.3587263857106324e-15, 1.5729349381685911e-15,
        -2.2782966239546465e-16, -6.3123304507564298e-17,
    ];

    /// <summary>e^x; 0 far below, infinity far above, NaN stays.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<T> Exp<T>(Vector<T> x)
        where T : unmanaged =>
        typeof(T) == typeof(float)
            ? Unsafe.BitCast<Vector<float>, Vector<T>>(
                Exp(Unsafe.BitCast<Vector<T>, Vector<float>>(x)))
            : Unsafe.BitCast<Vector<double>, Vector<T>>(
                Vector.Exp(Unsafe.BitCast<Vector<T>, Vector<double>>(x)));

    /// <summary>1 / (1 + e^-x).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<T> Sigmoid<T>(Vector<T> x)
        where T : unmanaged => Vector<T>.One / (Vector<T>.One + Exp(-x));

    /// <summary>The same of one number.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static T Sigmoid<T>(T x)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> => T.One / (T.One + T.Exp(-x));

    /// <summary>The normal distribution: its integral up to x, and its density at x.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<T> NormalCdf<T>(Vector<T> x, out Vector<T> density)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Vector<T> half = Vector.Create(Real.Of<T>(0.5));
        Vector<T> z = Vector.Abs(x) * Real.Of<T>(Math.Sqrt(0.5));
        Vector<T> bell = Exp(-(x * x * half));
        Vector<T> t = Vector<T>.One / (Vector<T>.One + (z * half));
        int terms = typeof(T) == typeof(float) ? 11 : s_erfc.Length;
        Vector<T> s = t + t - Vector<T>.One, s2 = s + s;
        Vector<T> last = default, before = default;
        for (int k = terms - 1; k > 0; k--)
        {
            Vector<T> next = (s2 * last) - before + Vector.Create(Real.Of<T>(s_erfc[k]));
            (before, last) = (last, next);
        }

        Vector<T> series = (s * last) - before + Vector.Create(Real.Of<T>(s_erfc[0]));
        Vector<T> tail = half * t * bell * series;
        density = bell * Real.Of<T>(1 / Math.Sqrt(2 * Math.PI));
        return Vector.ConditionalSelect(
            Vector.LessThan(x, Vector<T>.Zero), tail, Vector<T>.One - tail);
    }

    // e^x = 2^n e^r with |r| at most ln 2 / 2; the polynomial is Cephes' expf. 2^n is applied in
    // two halves, so that subnormal results and those near the largest float come out right.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector<float> Exp(Vector<float> x)
    {
        x = Vector.Min(Vector.Max(x, Vector.Create(-105f)), Vector.Create(90f));
        Vector<float> n = Vector.Round(x * 1.44269504f);
        Vector<float> r = Vector.MultiplyAddEstimate(n, Vector.Create(-0.693359375f), x);
        r = Vector.MultiplyAddEstimate(n, Vector.Create(2.12194440e-4f), r);
        Vector<float> p = Vector.Create(1.9875691500e-4f);
        p = Vector.MultiplyAddEstimate(p, r, Vector.Create(1.3981999507e-3f));
        p = Vector.MultiplyAddEstimate(p, r, Vector.Create(8.3334519073e-3f));
        p = Vector.MultiplyAddEstimate(p, r, Vector.Create(4.1665795894e-2f));
        p = Vector.MultiplyAddEstimate(p, r, Vector.Create(1.6666665459e-1f));
        p = Vector.MultiplyAddEstimate(p, r, Vector.Create(5.0000001201e-1f));
        p = Vector.MultiplyAddEstimate(p, r * r, r) + Vector<float>.One;
        Vector<int> whole = Vector.ConvertToInt32Native(n);
        Vector<int> half = whole >> 1;
        return p * PowerOfTwo(half) * PowerOfTwo(whole - half);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector<float> PowerOfTwo(Vector<int> n) =>
        Vector.AsVectorSingle((n + Vector.Create(127)) << 23);
}
