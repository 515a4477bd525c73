using System.Text;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.GpuEmulator.Driver;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>cp.async.bulk.tensor with tiled maps as kernel parameters and in memory, against the
/// ISA's description of boxes, swizzles and what lies outside.</summary>
[TestFixture]
public sealed unsafe class EmulatorTensorCopyTests
{
    private const int BFloat16 = 9, Bytes = 512;

    // The box at the coordinates goes to shared memory, its bytes to d, and back through the map at
    // out.
    private static string Kernel(int rank, int[] at, int bytes) => EmulatorWarpgroupTests.Header
        + $$"""
        .shared .align 1024 .b8 space[2048];
        .visible .entry k(.param .u64 d, .param .u64 out, .param .align 64 .b8 map[128])
        {
            .reg .pred %p<4>; .reg .b32 %t<10>, %x<5>; .reg .b64 %l<10>;
            mov.u32 %t0, %tid.x; mov.u32 %t1, space; add.u32 %t2, %t1, 1024;
            {{string.Concat(at.Select((x, n) => $"mov.u32 %x{n}, {x};"))}}
            mov.b64 %l0, map; cvta.param.u64 %l1, %l0; ld.param.u64 %l2, [out];
            setp.ne.u32 %p0, %t0, 0; @%p0 bra WAIT;
            prefetch.param.tensormap [%l0];
            mbarrier.init.shared::cta.b64 [%t1], 1;
            mbarrier.arrive.expect_tx.shared::cta.b64 _, [%t1], {{bytes}};
            cp.async.bulk.tensor.{{rank}}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%t2], [%l1, {{{Names(rank)}}}], [%t1];
            WAIT: bar.sync 0;
            TEST: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%t1], 0; @!%p1 bra TEST;
            ld.param.u64 %l3, [d]; mul.wide.u32 %l4, %t0, 4; add.s64 %l3, %l3, %l4;
            mad.lo.u32 %t3, %t0, 4, %t2; mov.u32 %t4, 0;
            COPY: ld.shared.u32 %t5, [%t3]; st.global.u32 [%l3], %t5; add.u32 %t3, %t3, 128;
            add.s64 %l3, %l3, 128; add.u32 %t4, %t4, 128; setp.lt.u32 %p1, %t4, {{bytes}}; @%p1 bra COPY;
            @%p0 bra END;
            cp.async.bulk.tensor.{{rank}}d.global.shared::cta.bulk_group [%l2, {{{Names(rank)}}}], [%t2];
            cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
            END: ret;
        }
        """;

    private static string Names(int rank) =>
        string.Join(", ", Enumerable.Range(0, rank).Select(n => $"%x{n}"));

    [TestCase(new[] { 40, 20 }, new[] { 32, 8 }, new[] { 0, 0 }, 0)]
    [TestCase(new[] { 40, 20 }, new[] { 32, 8 }, new[] { 16, 15 }, 2)]
    [TestCase(new[] { 40, 20 }, new[] { 32, 8 }, new[] { -5, -2 }, 3)]
    [TestCase(new[] { 37, 20 }, new[] { 16, 16 }, new[] { 30, 3 }, 1)]
    [TestCase(new[] { 200, 9 }, new[] { 64, 4 }, new[] { 128, 4 }, 3)]
    [TestCase(new[] { 24, 6, 5 }, new[] { 16, 4, 2 }, new[] { 8, 4, 4 }, 1)]
    [TestCase(new[] { 24, 3, 2, 5 }, new[] { 8, 2, 4, 2 }, new[] { 20, -1, 0, 4 }, 0)]
    public void ABoxGoesThereAndBack(int[] sizes, int[] box, int[] at, int swizzle)
    {
        int rank = sizes.Length, bytes = box.Aggregate(2, (a, b) => a * b);
        var strides = new long[rank];
        strides[0] = 2;
        for (int n = 1; n < rank; n++)
            strides[n] = (strides[n - 1] * sizes[n - 1] + 15) / 16 * 16 + 16;
        var source = new ushort[strides[^1] * sizes[^1] / 2];
        for (int n = 0; n < source.Length; n++) source[n] = (ushort)(n * 7 + 1);
        using var gpu = new TestGpu(new() { Architecture = 90, EarlyAsyncCopies = swizzle == 1 });
        ulong from = gpu.Upload(source), to = gpu.Upload(new ushort[source.Length]),
            d = gpu.Upload(new byte[Bytes]);
        TensorMap Map(ulong address)
        {
            Assert.That(TensorMap.EncodeTiled(out var map, BFloat16, address,
                [.. sizes.Select(s => (ulong)s)], [.. strides[1..].Select(s => (ulong)s)],
                [.. box.Select(b => (uint)b)], [.. box.Select(_ => 1u)], 0, swizzle, 0), Is.Zero);
            return map;
        }
        ulong outMap = gpu.Upload<TensorMap>([Map(to)]);
        Launch(gpu, Kernel(rank, at, bytes), d, outMap, Map(from));
        ushort[] got = gpu.Download<ushort>(d, bytes / 2),
            back = gpu.Download<ushort>(to, source.Length), expected = new ushort[source.Length];
        for (int e = 0; e < bytes / 2; e++)
        {
            long place = 0;
            bool inside = true;
            for (int n = 0, left = e; n < rank; left /= box[n++])
            {
                int x = at[n] + left % box[n];
                inside &= x >= 0 && x < sizes[n];
                place += x * strides[n] / 2;
            }
            int offset = e * 2, mask = swizzle == 0 ? 0 : (1 << swizzle) - 1;
            offset ^= (offset >> 7 & mask) << 4;
            Assert.That(got[offset / 2], Is.EqualTo(inside ? source[place] : 0), $"element {e}");
            if (inside) expected[place] = source[place];
        }
        Assert.That(back, Is.EqualTo(expected));
    }

    private static void Launch(TestGpu gpu, string ptx, ulong d, ulong outMap, TensorMap map)
    {
        var driver = gpu.Context.Api.Driver;
        nint module, function;
        fixed (byte* text = Encoding.UTF8.GetBytes(ptx + "\0"))
        fixed (byte* name = "k\0"u8)
        {
            driver.Check(driver.ModuleLoadDataEx(&module, text, 0, null, null), "load");
            driver.Check(driver.ModuleGetFunction(&function, module, name), "k");
        }
        void** parameters = stackalloc void*[3];
        parameters[0] = &d;
        parameters[1] = &outMap;
        parameters[2] = &map;
        driver.Check(driver.LaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, gpu.Stream.Handle,
            parameters, null), "launch");
    }

    [Test]
    public void WhatIsNoTensorMapIsFound()
    {
        using var gpu = new TestGpu(new() { Architecture = 90 });
        Launch(gpu, Kernel(2, [0, 0], Bytes), gpu.Upload(new byte[Bytes]), 0, default);
        Assert.That(gpu.Finding().Check, Is.EqualTo(Check.Descriptor));
    }

    // Rows of 24 bytes, rows longer than the swizzle, a stride of 24, 257 rows, an odd address.
    [TestCase(0x1000ul, 64ul, 12u, 8u, 0)]
    [TestCase(0x1000ul, 64ul, 32u, 8u, 1)]
    [TestCase(0x1000ul, 24ul, 8u, 8u, 0)]
    [TestCase(0x1000ul, 64ul, 8u, 257u, 0)]
    [TestCase(0x1008ul, 64ul, 8u, 8u, 0)]
    public void MapsThatTheDriverRefusesAreRefused(ulong address, ulong stride, uint columns,
        uint rows, int swizzle) =>
        Assert.That(TensorMap.EncodeTiled(out _, BFloat16, address, [32, 300], [stride],
            [columns, rows], [1, 1], 0, swizzle, 0), Is.EqualTo(1));
}
