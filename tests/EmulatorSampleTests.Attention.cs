using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

// The two kernels that synchronise most: flash attention and the grid-wide sum.
public sealed partial class EmulatorSampleTests
{
    [TestCase(64, 0)]
    [TestCase(128, 0)]
    [TestCase(64, 40)]
    public void FlashAttention(int size, int window)
    {
        const int batch = 2, tokens = 100, heads = 4, kvHeads = 2;
        float scale = 1.4427f / MathF.Sqrt(size);
        ushort[] q = TestGpu.Brain(TestGpu.Numbers(batch * tokens * heads * size, 13));
        ushort[] k = TestGpu.Brain(TestGpu.Numbers(batch * tokens * kvHeads * size, 14));
        ushort[] v = TestGpu.Brain(TestGpu.Numbers(batch * tokens * kvHeads * size, 15));
        ulong o = _gpu.Allocate(q.Length * 2), l = _gpu.Allocate(batch * heads * tokens * 4);
        var kernel = _module.Kernel($"flash_fwd_d{size}");
        int shared = 5 * 64 * size * 2;
        kernel.AllowShared(shared);
        var a = kernel.Arguments();
        a.Pointer(o, DType.BF16).Pointer(l, DType.F32).Pointer(_gpu.Upload(q), DType.BF16)
            .Pointer(_gpu.Upload(k), DType.BF16).Pointer(_gpu.Upload(v), DType.BF16).Int(tokens)
            .Int(heads)
            .Int(kvHeads).Float(scale).Int(window);
        a.Launch(_gpu.Stream, new((tokens + 63) / 64, heads, batch), 128, shared);
        ushort[] got = _gpu.Download<ushort>(o, q.Length);
        float[] lse = _gpu.Download<float>(l, batch * heads * tokens);
        var weights = new double[tokens];
        for (int b = 0; b < batch; b++)
            for (int h = 0; h < heads; h++)
                for (int t = 0; t < tokens; t += 3)
                {
                    int first = window > 0 ? Math.Max(0, t - window + 1) : 0;
                    double sum = 0;
                    for (int s = first; s <= t; s++)
                    {
                        double dot = 0;
                        for (int d = 0; d < size; d++)
                            dot += TestGpu.Widen(q[((b * tokens + t) * heads + h) * size + d])
                                * TestGpu.Widen(k[((b * tokens + s) * kvHeads + h / 2) * size + d]);
                        sum += weights[s] = Math.Pow(2, dot * scale);
                    }
                    Close(lse[(b * heads + h) * tokens + t], Math.Log2(sum), 2e-6, 2e-6);
                    for (int d = 0; d < size; d++)
                    {
                        double expected = 0;
                        for (int s = first; s <= t; s++)
                            expected += weights[s] / sum
                                * TestGpu.Widen(v[((b * tokens + s) * kvHeads + h / 2) * size + d]);
                        Close(TestGpu.Widen(got[((b * tokens + t) * heads + h) * size + d]),
                            expected, Brain, 4e-3);
                    }
                }
    }

    [Test]
    public void GradientNorm()
    {
        const int n = 8 * 5000, blocks = 7;
        float[] values = TestGpu.Numbers(n, 17);
        ushort[] g = TestGpu.Brain(values);
        ulong partial = _gpu.Allocate(blocks * 8), result = _gpu.Allocate(8),
            counter = _gpu.Upload(new uint[2]);
        var a = _module.Kernel("grad_norm").Arguments();
        a.Pointer(partial, DType.F64).Pointer(result, DType.F32).Pointer(counter, DType.I32)
            .Pointer(_gpu.Upload(g), DType.BF16).Long(n / 8).Float(1);
        a.Launch(_gpu.Stream, blocks, 256);
        double norm = Math.Sqrt(g.Sum(x => TestGpu.Widen(x) * TestGpu.Widen(x)));
        float[] got = _gpu.Download<float>(result, 2);
        Close(got[0], norm, 1e-6);
        Close(got[1], 1 / (norm + 1e-6), 1e-6);
        Assert.That(_gpu.Download<uint>(counter, 2), Is.EqualTo(new uint[] { 0, 0 }));
    }
}
