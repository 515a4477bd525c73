using System.Text;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// wgmma against the PTX ISA's figures of register fragments and its table of canonical layouts,
/// written down here anew: a layout wrong in the emulator and in a kernel would cancel.
/// </summary>
[TestFixture]
public sealed class EmulatorWarpgroupTests
{
    internal const string Header = ".version 8.0\n.target sm_90a\n.address_size 64\n";

    // The canonical layouts for 16-bit elements: T = 8 elements of 16 bytes, offsets in elements.
    // K-major: ((8, m), (T, 2)) : ((R, SBO), (1, LBO or T)); MN-major: ((T, R / T, m), (8, k)) :
    // ((1, T, LBO), (R, SBO)), without swizzling ((1, -, SBO), (T, LBO)); R = row bytes / 2.
    private static int Place(int outer, int k, bool mnMajor, int rowBytes, int leading, int stride)
    {
        int row = rowBytes / 2, at;
        if (!mnMajor)
            at = outer % 8 * row + outer / 8 * stride + k % 8
                + k / 8 * (rowBytes == 16 ? leading : 8);
        else if (rowBytes == 16)
            at = outer % 8 + outer / 8 * stride + k % 8 * 8 + k / 8 * leading;
        else
            at = outer % 8 + outer / 8 % (row / 8) * 8 + outer / row * leading + k % 8 * row
                + k / 8 * stride;
        // Swizzle<B, 4, 3> on byte addresses: bits 4.. ^= bits 7...
        int bytes = at * 2, mask = rowBytes / 16 - 1;
        return (bytes ^ (bytes >> 7 & mask) << 4) / 2;
    }

    private static ulong Descriptor(int address, int leading, int stride, int rowBytes) =>
        (uint)address >> 4 | (ulong)((uint)leading * 2 >> 4) << 16
        | (ulong)((uint)stride * 2 >> 4) << 32
        | (rowBytes switch { 128 => 1ul, 64 => 2, 32 => 3, _ => 0 }) << 62;

    // Dense enough for any layout: strides in elements between 8-row groups and between halves.
    private static (int Leading, int Stride) Strides(int outer, bool mnMajor, int rowBytes)
    {
        int atom = 8 * rowBytes / 2;
        if (!mnMajor) return rowBytes == 16 ? (64, 128) : (8, atom);
        return rowBytes == 16 ? (outer * 8, 64) : (2 * atom, atom);
    }

    [Test]
    public void MultiplyFollowsTheLayouts([Values(16, 32, 64, 128)] int rowBytes,
        [Values(8, 24, 64, 256)] int columns, [Values] bool aMajor, [Values] bool bMajor)
    {
        if (bMajor && columns % (rowBytes / 2) != 0)
            columns = (columns / (rowBytes / 2) + 1) * (rowBytes / 2);
        Multiply(rowBytes, columns, aMajor, bMajor, registers: false, "1", "1");
    }

    [TestCase(8, false, "1", "1")]
    [TestCase(128, true, "1", "1")]
    [TestCase(64, false, "-1", "1")]
    [TestCase(64, false, "1", "-1")]
    [TestCase(64, true, "-1", "-1")]
    public void MultiplyTakesARegisterFragment(int columns, bool bMajor, string signA, string signB)
        => Multiply(128, columns, false, bMajor, registers: true, signA, signB);

    private static void Multiply(int rowBytes, int columns, bool aMajor, bool bMajor,
        bool registers, string signA, string signB)
    {
        var random = new Random(columns + rowBytes);
        float[,] a = new float[64, 16], b = new float[16, columns], c = new float[64, columns];
        for (int r = 0; r < 64; r++)
            for (int k = 0; k < 16; k++) a[r, k] = random.Next(-9, 10);
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < columns; n++) b[k, n] = random.Next(-9, 10);
        for (int r = 0; r < 64; r++)
            for (int n = 0; n < columns; n++) c[r, n] = random.Next(-99, 100);
        const int half = 16384; // elements of shared memory for each operand
        var shared = new ushort[2 * half];
        var (leadingA, strideA) = Strides(64, aMajor, rowBytes);
        var (leadingB, strideB) = Strides(columns, bMajor, rowBytes);
        for (int k = 0; k < 16; k++)
        {
            for (int r = 0; r < 64; r++)
                shared[Place(r, k, aMajor, rowBytes, leadingA, strideA)] = Brain(a[r, k]);
            for (int n = 0; n < columns; n++)
                shared[half + Place(n, k, bMajor, rowBytes, leadingB, strideB)] = Brain(b[k, n]);
        }
        // "D: row = 16 * (warp % 4) + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) +
        // lane % 4 * 2 + i % 2"; A: "row = 16 * warp + lane / 4 + 8 * (i / 2 % 2),
        // column = lane % 4 * 2 + i % 2 + 8 * (i / 4)".
        int Row(int t, int i) => 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2);
        int Column(int t, int i) => 8 * (i / 4) + t % 4 * 2 + i % 2;
        int count = columns / 2;
        var laneC = new float[128 * count];
        var laneA = new ushort[128 * 8];
        for (int t = 0; t < 128; t++)
        {
            for (int i = 0; i < count; i++) laneC[t * count + i] = c[Row(t, i), Column(t, i)];
            for (int i = 0; i < 8; i++) laneA[t * 8 + i] = Brain(a[Row(t, i), Column(t, i)]);
        }
        string d = string.Join(", ", Enumerable.Range(0, count).Select(n => $"%d{n}"));
        string operand = registers ? "{%t0, %t1, %t2, %t3}" : "%da";
        string trans = registers ? $"{(bMajor ? 1 : 0)}" : $"{(aMajor ? 1 : 0)}, {(bMajor ? 1 : 0)}";
        using var gpu = new TestGpu(new() { Architecture = 90 });
        using var module = Load(gpu, $$"""
            mov.u32 %t9, space;
            mul.lo.u32 %t8, %tid.x, 16; ld.param.u64 %l0, [a]; cvt.u64.u32 %l1, %t8;
            add.s64 %l2, %l0, %l1; add.u32 %t9, %t9, %t8; mov.u32 %t7, 0;
            L: ld.global.v4.u32 {%t0, %t1, %t2, %t3}, [%l2]; st.shared.v4.u32 [%t9], {%t0, %t1, %t2, %t3};
            add.s64 %l2, %l2, 2048; add.u32 %t9, %t9, 2048; add.u32 %t7, %t7, 1;
            setp.lt.u32 %p0, %t7, 32; @%p0 bra L;
            ld.param.u64 %l0, [b]; add.s64 %l2, %l0, %l1;
            ld.global.v4.u32 {%t0, %t1, %t2, %t3}, [%l2];
            ld.param.u64 %l0, [c]; mul.wide.u32 %l1, %tid.x, {{count * 4}}; add.s64 %l2, %l0, %l1;
            {{string.Concat(Enumerable.Range(0, count).Select(n => $"ld.global.f32 %d{n}, [%l2+{n * 4}];\n"))}}
            fence.proxy.async.shared::cta; bar.sync 0;
            mov.u32 %t9, space; shr.u32 %t9, %t9, 4; cvt.u64.u32 %l0, %t9;
            or.b64 %da, %l0, {{Descriptor(0, leadingA, strideA, rowBytes)}}U;
            add.u64 %l0, %l0, {{half * 2 / 16}}; or.b64 %db, %l0, {{Descriptor(0, leadingB, strideB, rowBytes)}}U;
            wgmma.fence.sync.aligned;
            setp.eq.u32 %p0, 0, 0;
            wgmma.mma_async.sync.aligned.m64n{{columns}}k16.f32.bf16.bf16 {{{d}}}, {{operand}}, %db, %p0, {{signA}}, {{signB}}, {{trans}};
            wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
            ld.param.u64 %l0, [d]; add.s64 %l2, %l0, %l1;
            {{string.Concat(Enumerable.Range(0, count).Select(n => $"st.global.f32 [%l2+{n * 4}], %d{n};\n"))}}
            """);
        ulong result = gpu.Allocate(128 * count * 4);
        var arguments = module.Kernel("k").Arguments();
        arguments.Pointer(result, DType.I64).Pointer(gpu.Upload(shared), DType.I64)
            .Pointer(gpu.Upload(laneA), DType.I64).Pointer(gpu.Upload(laneC), DType.I64);
        arguments.Launch(gpu.Stream, 1, 128);
        float[] got = gpu.Download<float>(result, 128 * count);
        int sign = signA == signB ? 1 : -1;
        for (int t = 0; t < 128; t++)
            for (int i = 0; i < count; i++)
            {
                float expected = c[Row(t, i), Column(t, i)];
                for (int k = 0; k < 16; k++)
                    expected += sign * a[Row(t, i), k] * b[k, Column(t, i)];
                Assert.That(got[t * count + i], Is.EqualTo(expected), $"thread {t}, register {i}");
            }
        Assert.That(gpu.Emulator.Launches[^1].TensorFlops, Is.EqualTo(2L * 64 * columns * 16));
    }

    private static ushort Brain(float value) =>
        (ushort)(BitConverter.SingleToUInt32Bits(value) >> 16);

    /// <summary>A kernel k of four pointers around the lines, with 64 KiB of static shared
    /// memory.</summary>
    internal static CudaModule Load(TestGpu gpu, string lines, string directive = "") =>
        CudaModule.LoadPtx(gpu.Context,
        Encoding.UTF8.GetBytes(Header + $$"""
        .shared .align 1024 .b8 space[65536];
        .visible .entry k(.param .u64 d, .param .u64 a, .param .u64 b, .param .u64 c) {{directive}}
        {
            .reg .pred %p<10>;
            .reg .b32 %t<30>;
            .reg .f32 %d<128>;
            .reg .b64 %l<10>, %da, %db;
            {{lines}}
            ret;
        }
        """ + "\0"),
        "extern \"C\" __global__ void k(long long* d, const long long* a, const long long* b, const long long* c);",
        DType.F32);
}
