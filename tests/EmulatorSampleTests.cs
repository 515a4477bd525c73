using System.IO.Compression;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Fourteen kernels of every kind the engine needs, from the PTX of NVRTC here, of clang and of
/// newer NVRTC versions (committed), against formulas in double. Tolerances: a bf16 result is
/// within its rounding, 2^-8 relative; float results within a few 1e-6; flash attention rounds its
/// probabilities to bf16 too. The modes are what hardware may do otherwise: results must hold in
/// all of them.
/// </summary>
[TestFixtureSource(nameof(Fixtures))]
public sealed partial class EmulatorSampleTests(string origin, string mode)
{
    private TestGpu _gpu = null!;
    private CudaModule _module = null!;

    private static string Folder => Path.Combine(ReferenceFile.Root, "ptx");

    private static string[] Origins =>
        ["nvrtc", "clang",
            .. Directory.GetFiles(Folder, "sample-*.gz").Select(f => Path.GetFileName(f)!).Order()];

    private static IEnumerable<TestFixtureData> Fixtures()
    {
        foreach (string origin in Origins) yield return new(origin, "plain");
        foreach (string mode in (string[])["seed 1", "seed 2", "seed 3", "harsh"])
            yield return new(Origins[^2], mode);
    }

    private static EmulatorOptions Options(string mode) => mode switch
    {
        "plain" => new(),
        "harsh" => new()
        {
            Seed = 4,
            EarlyAsyncCopies = true,
            ApproximateUlps = 2,
            ReverseMma = true
        },
        _ => new() { Seed = int.Parse(mode[5..]) },
    };

    [OneTimeSetUp]
    public void Load()
    {
        if (origin == "nvrtc" && CudaTools.Nvrtc == null) Assert.Ignore("NVRTC is not installed");
        _gpu = new(Options(mode), origin == "clang" ? DeviceCompiler.Clang : DeviceCompiler.Nvrtc);
        string source = File.ReadAllText(Path.Combine(Folder, "sample-kernels.cu"));
        if (origin is "nvrtc" or "clang")
        {
            _module = _gpu.Compile(source);
            return;
        }
        using var stream =
            new GZipStream(File.OpenRead(Path.Combine(Folder, origin)), CompressionMode.Decompress);
        var text = new MemoryStream();
        stream.CopyTo(text);
        text.WriteByte(0);
        _module = CudaModule.LoadPtx(_gpu.Context, text.ToArray(), source, DType.BF16);
    }

    [OneTimeTearDown]
    public void Unload() => _gpu?.Dispose();

    private static void Close(double got, double expected, double relative,
        double absolute = 1e-9) =>
        Assert.That(got, Is.EqualTo(expected).Within(Math.Abs(expected) * relative + absolute));

    private const double Brain = 1.0 / 256;

    [Test]
    public void RmsNorm()
    {
        const int rows = 5, n = 1048;
        ushort[] x = TestGpu.Brain(TestGpu.Numbers(rows * n, 1)),
            w = TestGpu.Brain(TestGpu.Numbers(n, 2));
        ulong y = _gpu.Allocate(rows * n * 2), rstd = _gpu.Allocate(rows * 4);
        var a = _module.Kernel("rmsnorm_fwd").Arguments();
        a.Pointer(y, DType.BF16).Pointer(rstd, DType.F32).Pointer(_gpu.Upload(x), DType.BF16)
            .Pointer(_gpu.Upload(w), DType.BF16).Int(n).Float(1e-6f);
        a.Launch(_gpu.Stream, rows, 256);
        ushort[] got = _gpu.Download<ushort>(y, rows * n);
        float[] scales = _gpu.Download<float>(rstd, rows);
        for (int r = 0; r < rows; r++)
        {
            double sum = 0;
            for (int c = 0; c < n; c++) sum += Math.Pow(TestGpu.Widen(x[r * n + c]), 2);
            double s = 1 / Math.Sqrt(sum / n + 1e-6);
            Close(scales[r], s, 1e-6);
            for (int c = 0; c < n; c++)
                Close(TestGpu.Widen(got[r * n + c]),
                    TestGpu.Widen(x[r * n + c]) * s * TestGpu.Widen(w[c]), Brain);
        }
    }

    [Test]
    public void CrossEntropy()
    {
        const int rows = 4, vocabulary = 1531;
        const float scale = 0.5f, z = 1e-4f;
        ushort[] x = TestGpu.Brain(TestGpu.Numbers(rows * vocabulary, 3, 4));
        int[] targets = [7, -100, 1530, 0];
        ulong logits = _gpu.Upload(x), loss = _gpu.Allocate(rows * 4);
        var a = _module.Kernel("xent_fwd_bwd").Arguments();
        a.Pointer(logits, DType.BF16).Pointer(_gpu.Upload(targets), DType.I32)
            .Pointer(loss, DType.F32)
            .Int(vocabulary).Float(scale).Float(z);
        a.Launch(_gpu.Stream, rows, 512);
        float[] losses = _gpu.Download<float>(loss, rows);
        ushort[] gradients = _gpu.Download<ushort>(logits, rows * vocabulary);
        for (int r = 0; r < rows; r++)
        {
            double sum = 0;
            for (int c = 0; c < vocabulary; c++)
                sum += Math.Exp(TestGpu.Widen(x[r * vocabulary + c]));
            double lse = Math.Log(sum);
            int t = targets[r];
            Close(losses[r], t < 0 ? 0 : lse - TestGpu.Widen(x[r * vocabulary + t]) + z * lse * lse,
                2e-6);
            for (int c = 0; c < vocabulary; c++)
            {
                double q = Math.Exp(TestGpu.Widen(x[r * vocabulary + c]) - lse);
                double g = t < 0 ? 0 : (q * (1 + 2 * z * lse) - (c == t ? 1 : 0)) * scale;
                Close(TestGpu.Widen(gradients[r * vocabulary + c]), g, Brain);
            }
        }
    }

    [Test]
    public void Rope()
    {
        const int tokens = 6, heads = 3, size = 64;
        int[] positions = [0, 1, 17, 300, 4000, 32000];
        ushort[] x = TestGpu.Brain(TestGpu.Numbers(tokens * heads * size, 4));
        ulong q = _gpu.Upload(x);
        var a = _module.Kernel("rope").Arguments();
        a.Pointer(q, DType.BF16).Pointer(_gpu.Upload(positions), DType.I32).Int(tokens).Int(heads)
            .Int(size)
            .Float(10000).Int(0);
        a.Launch(_gpu.Stream, 3, 128);
        ushort[] got = _gpu.Download<ushort>(q, x.Length);
        for (int r = 0; r < tokens * heads; r++)
        {
            for (int d = 0; d < size / 2; d++)
            {
                int position = positions[r / heads];
                // The kernel's angle is a float: its error grows with the position.
                double angle = Math.Pow(10000, -2.0 * d / size) * position,
                    slack = 2e-6 * Math.Max(1, angle);
                double u = TestGpu.Widen(x[r * size + d]),
                    v = TestGpu.Widen(x[r * size + d + size / 2]);
                Close(TestGpu.Widen(got[r * size + d]), u * Math.Cos(angle) - v * Math.Sin(angle),
                    Brain, slack);
                Close(TestGpu.Widen(got[r * size + d + size / 2]), v * Math.Cos(angle)
                    + u * Math.Sin(angle), Brain,
                    slack);
            }
        }
    }

    private static uint[] Philox(ulong seed, ulong counter, ulong offset)
    {
        uint k0 = (uint)seed, k1 = (uint)(seed >> 32);
        uint[] c = [(uint)counter, (uint)(counter >> 32), (uint)offset, (uint)(offset >> 32)];
        for (int round = 0; round < 10; round++)
        {
            ulong a = 0xD2511F53ul * c[0], b = 0xCD9E8D57ul * c[2];
            c = [(uint)(b >> 32) ^ c[1] ^ k0, (uint)b, (uint)(a >> 32) ^ c[3] ^ k1, (uint)a];
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        return c;
    }

    [Test]
    public void Dropout()
    {
        const int n = 1002;
        const float p = 0.3f;
        const ulong seed = 0x123456789ABCDEF, offset = 42;
        float[] x = TestGpu.Numbers(n, 5);
        ulong y = _gpu.Allocate(n * 4), mask = _gpu.Allocate(n);
        var a = _module.Kernel("dropout_philox").Arguments();
        a.Pointer(y, DType.F32).Pointer(mask, DType.U8).Pointer(_gpu.Upload(x), DType.F32).Long(n)
            .Float(p)
            .Long((long)seed).Long((long)offset);
        a.Launch(_gpu.Stream, 2, 128);
        float[] got = _gpu.Download<float>(y, n);
        byte[] kept = _gpu.Download<byte>(mask, n);
        for (int i = 0; i < n; i++)
        {
            bool keep = Philox(seed, (ulong)i / 4, offset)[i % 4] * 2.3283064365386963e-10f >= p;
            Assert.That(kept[i], Is.EqualTo(keep ? 1 : 0));
            Close(got[i], keep ? x[i] / (1 - p) : 0, 1e-6);
        }
    }

    [Test]
    public void AdamW()
    {
        const int n = 777;
        const float lr = 1e-2f, b1 = 0.9f, b2 = 0.99f, eps = 1e-8f, decay = 0.1f, c1 = 0.1f,
            c2 = 0.01f;
        ushort[] w = TestGpu.Brain(TestGpu.Numbers(n, 6)), g = TestGpu.Brain(TestGpu.Numbers(n, 7));
        float[] m = TestGpu.Numbers(n, 8), v = [.. TestGpu.Numbers(n, 9).Select(Math.Abs)];
        ulong dw = _gpu.Upload(w), dm = _gpu.Upload(m), dv = _gpu.Upload(v);
        var a = _module.Kernel("adamw_sr").Arguments();
        a.Pointer(dw, DType.BF16).Pointer(_gpu.Upload(g), DType.BF16).Pointer(dm, DType.F32)
            .Pointer(dv, DType.F32)
            .Long(n).Float(lr).Float(b1).Float(b2).Float(eps).Float(decay).Float(c1).Float(c2)
            .Pointer(_gpu.Upload([0.5f]), DType.F32).Long(1).Long(2);
        a.Launch(_gpu.Stream, 2, 128);
        ushort[] got = _gpu.Download<ushort>(dw, n);
        float[] gotM = _gpu.Download<float>(dm, n), gotV = _gpu.Download<float>(dv, n);
        for (int i = 0; i < n; i++)
        {
            double gradient = TestGpu.Widen(g[i]) * 0.5;
            double mm = b1 * (double)m[i] + (1 - (double)b1) * gradient;
            double vv = b2 * (double)v[i] + (1 - (double)b2) * gradient * gradient;
            Close(gotM[i], mm, 1e-6, 1e-7);
            Close(gotV[i], vv, 1e-6, 1e-7);
            double old = TestGpu.Widen(w[i]);
            double expected =
                old * (1 - lr * (double)decay) - lr * (mm / c1) / (Math.Sqrt(vv / c2) + eps);
            // Stochastic rounding moves by less than one unit of bf16, 2^-7 at most.
            Close(TestGpu.Widen(got[i]), expected, 1.0 / 128, 1e-6);
        }
    }

    [Test]
    public void Nf4()
    {
        float[] table =
        [
            -1.0f, -0.6961928f, -0.5250731f, -0.3949175f, -0.2844414f, -0.1847734f, -0.0910500f,
                0.0f,
            0.0795803f, 0.1609302f, 0.2461123f, 0.3379152f, 0.4407098f, 0.5626170f, 0.7229568f,
            1.0f,
        ];
        const int bytes = 32 * 300;
        var q = new byte[bytes];
        new Random(10).NextBytes(q);
        byte[] scales = [.. Enumerable.Range(0, bytes / 32).Select(i => (byte)(i * 7))];
        float[] code = TestGpu.Numbers(256, 11), second = TestGpu.Numbers(2, 12);
        ulong y = _gpu.Allocate(bytes * 4);
        var a = _module.Kernel("nf4_dequant").Arguments();
        a.Pointer(y, DType.I32).Pointer(_gpu.Upload(q), DType.U8)
            .Pointer(_gpu.Upload(scales), DType.U8)
            .Pointer(_gpu.Upload(code), DType.F32).Pointer(_gpu.Upload(second), DType.F32)
            .Float(0.25f).Long(bytes);
        a.Launch(_gpu.Stream, 5, 256);
        ushort[] got = _gpu.Download<ushort>(y, bytes * 2);
        for (int i = 0; i < bytes; i++)
        {
            double s = code[scales[i / 32]] * (double)second[i / 32 / 256] + 0.25;
            Close(TestGpu.Widen(got[i * 2]), table[q[i] >> 4] * s, Brain, 1e-6);
            Close(TestGpu.Widen(got[i * 2 + 1]), table[q[i] & 15] * s, Brain, 1e-6);
        }
    }

    [Test]
    public void EmbeddingScatter()
    {
        const int tokens = 9, size = 70, vocabulary = 5;
        int[] ids = [0, 3, 3, 4, 1, 0, 3, 7, 2];
        ushort[] dy = TestGpu.Brain(TestGpu.Numbers(tokens * size, 16));
        ulong dw = _gpu.Upload(new float[vocabulary * size]), error = _gpu.Upload(new int[1]);
        var a = _module.Kernel("embed_scatter").Arguments();
        a.Pointer(dw, DType.F32).Pointer(_gpu.Upload(dy), DType.BF16)
            .Pointer(_gpu.Upload(ids), DType.I32)
            .Int(size).Int(vocabulary).Pointer(error, DType.I32);
        a.Launch(_gpu.Stream, tokens, 64);
        float[] got = _gpu.Download<float>(dw, vocabulary * size);
        Assert.That(_gpu.Download<int>(error, 1)[0], Is.EqualTo(8),
            "the token with id 7, counted from one");
        for (int v = 0; v < vocabulary; v++)
            for (int c = 0; c < size; c++)
                Close(got[v * size + c], Enumerable.Range(0, tokens).Where(t => ids[t] == v)
                    .Sum(t => TestGpu.Widen(dy[t * size + c])), 1e-6, 1e-6);
    }

    [Test]
    public void ArgMax()
    {
        const int rows = 8, n = 133;
        float[] x = TestGpu.Numbers(rows * n, 18);
        x[3 * n + 100] = x[3 * n + 20] = 5; // the first of equals wins
        ulong y = _gpu.Allocate(rows * 4);
        var a = _module.Kernel("argmax_rows").Arguments();
        a.Pointer(y, DType.I32).Pointer(_gpu.Upload(x), DType.F32).Int(n);
        a.Launch(_gpu.Stream, 2, 128);
        int[] expected =
            [.. Enumerable.Range(0, rows)
            .Select(r => Array.IndexOf(x, x[(r * n)..((r + 1) * n)].Max(),
            r * n) - r * n)];
        Assert.That(_gpu.Download<int>(y, rows), Is.EqualTo(expected));
    }

    [Test]
    public void FusedLora()
    {
        const int m = 37, k = 50, n = 300;
        ushort[] y = TestGpu.Brain(TestGpu.Numbers(m * n, 19)),
            x = TestGpu.Brain(TestGpu.Numbers(m * k, 20));
        ushort[] down = TestGpu.Brain(TestGpu.Numbers(k * 16, 21)),
            up = TestGpu.Brain(TestGpu.Numbers(16 * n, 22));
        ulong dy = _gpu.Upload(y);
        var a = _module.Kernel("lora_fused").Arguments();
        a.Pointer(dy, DType.BF16).Pointer(_gpu.Upload(x), DType.BF16)
            .Pointer(_gpu.Upload(down), DType.BF16)
            .Pointer(_gpu.Upload(up), DType.BF16).Int(m).Int(k).Int(n).Float(0.25f);
        a.Launch(_gpu.Stream, (m + 15) / 16, 256);
        ushort[] got = _gpu.Download<ushort>(dy, m * n);
        for (int r = 0; r < m; r++)
        {
            var low = new double[16];
            for (int j = 0; j < 16; j++)
                for (int i = 0; i < k; i++)
                    low[j] += TestGpu.Widen(x[r * k + i]) * TestGpu.Widen(down[i * 16 + j]);
            for (int c = 0; c < n; c++)
            {
                double sum = 0;
                for (int j = 0; j < 16; j++) sum += low[j] * TestGpu.Widen(up[j * n + c]);
                Close(TestGpu.Widen(got[r * n + c]), TestGpu.Widen(y[r * n + c]) + 0.25 * sum,
                    Brain, 1e-5);
            }
        }
    }

    [Test]
    public void SwiGluGradient()
    {
        const int n = 500;
        ushort[] g = TestGpu.Brain(TestGpu.Numbers(n * 2, 23, 3)),
            u = TestGpu.Brain(TestGpu.Numbers(n * 2, 24));
        ushort[] d = TestGpu.Brain(TestGpu.Numbers(n * 2, 25));
        ulong dg = _gpu.Allocate(n * 4), du = _gpu.Allocate(n * 4);
        var a = _module.Kernel("swiglu_bwd").Arguments();
        a.Pointer(dg, DType.I32).Pointer(du, DType.I32).Pointer(_gpu.Upload(g), DType.I32)
            .Pointer(_gpu.Upload(u), DType.I32).Pointer(_gpu.Upload(d), DType.I32).Long(n);
        a.Launch(_gpu.Stream, 4, 128);
        ushort[] gotG = _gpu.Download<ushort>(dg, n * 2), gotU = _gpu.Download<ushort>(du, n * 2);
        for (int i = 0; i < n * 2; i++)
        {
            double x = TestGpu.Widen(g[i]), v = TestGpu.Widen(u[i]), t = TestGpu.Widen(d[i]),
                s = 1 / (1 + Math.Exp(-x));
            Close(TestGpu.Widen(gotG[i]), t * v * s * (1 + x * (1 - s)), Brain, 1e-6);
            Close(TestGpu.Widen(gotU[i]), t * x * s, Brain, 1e-6);
        }
    }

    [Test]
    public void GeluInHalf()
    {
        const int n = 333;
        Half[] x = [.. TestGpu.Numbers(n, 26, 4).Select(v => (Half)v)];
        ulong y = _gpu.Allocate(n * 2);
        var a = _module.Kernel("gelu_tanh_f16").Arguments();
        a.Pointer(y, DType.F16).Pointer(_gpu.Upload(x), DType.F16).Int(n);
        a.Launch(_gpu.Stream, 3, 128);
        Half[] got = _gpu.Download<Half>(y, n);
        for (int i = 0; i < n; i++)
        {
            double v = (double)x[i];
            double expected = 0.5 * v * (1 + Math.Tanh(0.7978845608 * (v + 0.044715 * v * v * v)));
            Close((double)got[i], expected, 1.0 / 1024, 1e-6);
        }
    }
}
