using System.Runtime.InteropServices;
using System.Text;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Tests;

/// <summary>
/// Runs a few lines of PTX on one warp: lane n reads its words of the inputs into %a, %b, %c,
/// (64-bit ones into %la, %lb, %lc), the lines compute %d or %ld, which the lane stores. %p0 to
/// %p9, %t0 to %t9 (32 bits), %lt0 to %lt9 (64 bits) and %h0 to %h9 (16 bits) are free.
/// </summary>
internal static class PtxProbe
{
    private const string Signature =
        "extern \"C\" __global__ void probe(long long* d, const long long* a, const long long* b, "
            + "const long long* c)";

    /// <summary>32-bit results of up to 32 lanes; missing inputs are zeros.</summary>
    public static uint[] Run(TestGpu gpu, string lines, uint[] a, uint[]? b = null,
        uint[]? c = null) =>
        [.. Run64(gpu, lines + "\ncvt.u64.u32 %ld, %d;", Widen(a), Widen(b), Widen(c))
        .Select(v => (uint)v)];

    private static ulong[] Widen(uint[]? values) => [.. (values ?? []).Select(v => (ulong)v)];

    public static ulong[] Run64(TestGpu gpu, string lines, ulong[] a, ulong[]? b = null,
        ulong[]? c = null)
    {
        using var module = Load(gpu, Text(lines));
        ulong d = gpu.Upload(new ulong[32]);
        var arguments = module.Kernel("probe").Arguments();
        arguments.Pointer(d, DType.I64).Pointer(gpu.Upload(Lanes(a)), DType.I64)
            .Pointer(gpu.Upload(Lanes(b ?? [])), DType.I64)
            .Pointer(gpu.Upload(Lanes(c ?? [])), DType.I64);
        arguments.Launch(gpu.Stream, 1, 32);
        return gpu.Download<ulong>(d, 32)[..Math.Max(1, a.Length)];
    }

    private static ulong[] Lanes(ulong[] values)
    {
        var lanes = new ulong[32];
        values.CopyTo(lanes, 0);
        return lanes;
    }

    public static CudaModule Load(TestGpu gpu, string ptx) =>
        CudaModule.LoadPtx(gpu.Context, Encoding.UTF8.GetBytes(ptx + "\0"), Signature + ";",
            DType.F32);

    public static string Text(string lines) => $$"""
        .version 7.8
        .target sm_80
        .address_size 64
        .visible .entry probe(.param .u64 d, .param .u64 a, .param .u64 b, .param .u64 c)
        {
            .reg .pred %p<10>;
            .reg .b16 %h<10>;
            .reg .b32 %t<10>, %d, %a, %b, %c, %lane;
            .reg .b64 %lt<10>, %ld, %la, %lb, %lc, %pd, %at;
            .shared .align 16 .b8 space[4096];
            mov.u32 %lane, %tid.x;
            mul.wide.u32 %at, %lane, 8;
            ld.param.u64 %pd, [a];
            add.s64 %pd, %pd, %at;
            ld.global.u64 %la, [%pd];
            cvt.u32.u64 %a, %la;
            ld.param.u64 %pd, [b];
            add.s64 %pd, %pd, %at;
            ld.global.u64 %lb, [%pd];
            cvt.u32.u64 %b, %lb;
            ld.param.u64 %pd, [c];
            add.s64 %pd, %pd, %at;
            ld.global.u64 %lc, [%pd];
            cvt.u32.u64 %c, %lc;
            ld.param.u64 %pd, [d];
            add.s64 %pd, %pd, %at;
            mov.u32 %d, 0;
            {{lines}}
            st.global.u64 [%pd], %ld;
            ret;
        }
        """;

    public static uint F(float value) => BitConverter.SingleToUInt32Bits(value);

    public static float F(uint bits) => BitConverter.UInt32BitsToSingle(bits);

    public static ulong D(double value) => BitConverter.DoubleToUInt64Bits(value);
}
