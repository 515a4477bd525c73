using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// CUDA's math library as NVRTC compiles it, against .NET's functions in double: hundreds of
/// instructions per function (directed rounding, bit fields, funnels, local tables), so a wrong one
/// shows. Tolerances are the maximum errors that the CUDA programming guide states, in units in the
/// last place, and half a unit for the reference's own rounding.
/// </summary>
[TestFixture]
public sealed class EmulatorMathTests
{
    private const int Count = 4096;

    private static readonly (string Call, Func<double, double> Exact, double Ulps, double From,
        double To)[]
        s_functions =
    [
        ("expf(x)", Math.Exp, 2, -80, 80),
        ("exp2f(x)", v => Math.Pow(2, v), 2, -120, 120),
        ("expm1f(x)", v => v + (v * v / 2) + (v * v * v / 6), 1, -1e-3, 1e-3),
        ("logf(x)", Math.Log, 1, 1e-30, 1e5),
        ("log2f(x)", Math.Log2, 1, 1e-3, 1e5),
        ("log1pf(x)", v => v - (v * v / 2) + (v * v * v / 3), 1, -1e-3, 1e-3),
        ("sinf(x)", Math.Sin, 2, -100, 100),
        ("cosf(x)", Math.Cos, 2, -100, 100),
        ("sinf(x)", Math.Sin, 2, 1e6, 1e12),
        ("cosf(x)", Math.Cos, 2, 1e20, 3e20),
        ("tanf(x)", Math.Tan, 4, -3, 3),
        ("tanhf(x)", Math.Tanh, 2, -6, 6),
        ("powf(x, 2.7f)", v => Math.Pow(v, 2.7f), 4, 1e-4, 1e6),
        ("powf(10000.0f, -x)", v => Math.Pow(10000, -v), 4, 0, 1),
        ("cbrtf(x)", Math.Cbrt, 1, -1e6, 1e6),
        ("sqrtf(x)", Math.Sqrt, 0, 0, 1e10),
        ("rsqrtf(x)", v => 1 / Math.Sqrt(v), 2, 1e-10, 1e10),
        ("1.0f / x", v => 1 / v, 0, 1e-3, 1e3),
        ("fmodf(x, 0.37f)", v => Math.IEEERemainder(v, 0.37f) is var r && r < 0 ? r + 0.37f : r, 0,
            0, 1e4),
        ("atanf(x)", Math.Atan, 2, -50, 50),
        ("roundf(x)", v => Math.Round(v, MidpointRounding.AwayFromZero), 0, -1e4, 1e4),
        ("rintf(x)", v => Math.Round(v, MidpointRounding.ToEven), 0, -1e4, 1e4),
        ("(float)exp((double)x)", Math.Exp, 0.01, -80, 80),
        ("(float)log((double)x)", Math.Log, 0.01, 1e-30, 1e5),
        ("(float)(1.0 / (double)x)", v => 1 / v, 0.01, 1e-3, 1e3),
    ];

    private static IEnumerable<TestCaseData> Functions => s_functions.Select((f, n) =>
        new TestCaseData(n).SetName($"IsWithinCudasError({f.Call}, {f.From:g} to {f.To:g})"));

    private static string Source =>
        "extern \"C\" __global__ void k(float* y, const float* v, int f) {\n"
        + "int i = blockIdx.x * blockDim.x + threadIdx.x; float x = v[i], r = 0;\nswitch (f) {\n"
        + string.Concat(s_functions.Select((f, n) => $"case {n}: r = {f.Call}; break;\n"))
        + "} y[i] = r; }";

    [TestCaseSource(nameof(Functions))]
    public void IsWithinCudasError(int index)
    {
        if (CudaTools.Nvrtc == null)
            Assert.Ignore("NVRTC is not installed, clang's prelude has its own functions");
        var (call, exact, ulps, from, to) = s_functions[index];
        using var gpu = new TestGpu();
        var random = new Random(index);
        // Evenly in the exponent where the range is wide and positive, else evenly.
        float[] x = [.. Enumerable.Range(0, Count).Select(_ => (float)(from > 0 && to / from > 100
            ? from * Math.Pow(to / from, random.NextDouble())
            : from + ((to - from) * random.NextDouble())))];
        ulong y = gpu.Allocate(Count * 4);
        var a = gpu.Compile(Source).Kernel("k").Arguments();
        a.Pointer(y, DType.F32).Pointer(gpu.Upload(x), DType.F32).Int(index);
        a.Launch(gpu.Stream, Count / 256, 256);
        float[] got = gpu.Download<float>(y, Count);
        double worst = 0;
        float at = 0;
        for (int n = 0; n < Count; n++)
        {
            double expected = exact(x[n]);
            float near = (float)expected;
            double unit =
                Math.Max(Math.Abs(MathF.BitIncrement(MathF.Abs(near)) - (double)MathF.Abs(near)),
                1e-45);
            double error = Math.Abs(got[n] - expected) / unit;
            if (!(error <= worst)) (worst, at) = (error, x[n]);
        }
        TestContext.Out.WriteLine($"{call}: worst error {worst:0.000} units, at {at:g9}");
        Assert.That(worst, Is.LessThanOrEqualTo(ulps + 0.5), $"{call} at {at:g9}");
    }

    private static readonly (string Call, Func<long, long, long> Exact)[] s_integers =
    [
        ("a / b", (a, b) => a / b),
        ("a % b", (a, b) => a % b),
        ("(long long)((unsigned long long)a / (unsigned long long)b)",
            (a, b) => (long)((ulong)a / (ulong)b)),
        ("(long long)__umul64hi(a, b)", (a, b) => (long)Math.BigMul((ulong)a, (ulong)b, out _)),
        ("__mul64hi(a, b)", (a, b) => Math.BigMul(a, b, out _)),
        ("(long long)((int)a / ((int)b | 1))", (a, b) => (int)a / ((int)b | 1)),
        ("(long long)((unsigned)a % ((unsigned)b | 1))", (a, b) => (uint)a % ((uint)b | 1)),
        ("a << (b & 63)", (a, b) => a << (int)(b & 63)),
        ("a >> (b & 63)", (a, b) => a >> (int)(b & 63)),
        ("(long long)__clzll(a) * 100 + __popcll(b)",
            (a, b) => (long.LeadingZeroCount(a) * 100) + long.PopCount(b)),
        ("(long long)__brevll(a)",
            (a, _) => Enumerable.Range(0, 64).Sum(n => (a >> n & 1) << (63 - n))),
        ("(long long)__byte_perm((int)a, (int)b, 0x6420)",
            (a, b) => (uint)((a & 255) | (a >> 16 & 255) << 8
            | (b & 255) << 16 | (b >> 16 & 255) << 24)),
        ("(long long)(short)a * (signed char)b", (a, b) => (short)a * (sbyte)b),
        ("(long long)(float)a", (a, _) => (long)(float)a),
        ("(long long)(double)(unsigned long long)(a & 0xFFFFFFFFFFFFF)",
            (a, _) => a & 0xFFFFFFFFFFFFF),
        ("(long long)__funnelshift_l((unsigned)a, (unsigned)b, (unsigned)(a >> 40))",
            (a, b) => (uint)(((ulong)(uint)b << 32 | (uint)a) << (int)(a >> 40 & 31) >> 32)),
        ("(long long)__ffsll(a)", (a, _) => a == 0 ? 0 : long.TrailingZeroCount(a) + 1),
        ("a > b ? max((int)a, (int)b) : min((unsigned)a, (unsigned)b)",
            (a, b) => a > b ? (uint)Math.Max((int)a, (int)b) : Math.Min((uint)a, (uint)b)),
                // C's type is unsigned
    ];

    [Test]
    public void IntegersAreExact()
    {
        if (CudaTools.Nvrtc == null)
            Assert.Ignore("NVRTC is not installed, clang's prelude has no such functions");
        string source =
            "extern \"C\" __global__ void k(long long* y, const long long* v, const long long* w) {\n"
            + "int i = threadIdx.x; long long a = v[i], b = w[i];\n"
            + string.Concat(s_integers.Select((f, n) => $"y[i + {n} * 256] = {f.Call};\n")) + "}";
        var random = new Random(9);
        long Draw(int n) => n % 5 == 0 ? random.NextInt64(-100, 100)
            : (long)((ulong)random.NextInt64() << 1) >> random.Next(60);
        long[] a = [.. Enumerable.Range(0, 256).Select(Draw)];
        long[] b = [.. Enumerable.Range(1, 256)
            .Select(n => Draw(n) is var d && d is 0 or -1 ? 7 : d)];
        using var gpu = new TestGpu();
        ulong y = gpu.Allocate(256 * 8 * s_integers.Length);
        var arguments = gpu.Compile(source).Kernel("k").Arguments();
        arguments.Pointer(y, DType.I64).Pointer(gpu.Upload(a), DType.I64)
            .Pointer(gpu.Upload(b), DType.I64);
        arguments.Launch(gpu.Stream, 1, 256);
        long[] got = gpu.Download<long>(y, 256 * s_integers.Length);
        for (int f = 0; f < s_integers.Length; f++)
            for (int n = 0; n < 256; n++)
                Assert.That(got[(f * 256) + n], Is.EqualTo(s_integers[f].Exact(a[n], b[n])),
                    $"{s_integers[f].Call} of {a[n]}, {b[n]}");
    }
}
