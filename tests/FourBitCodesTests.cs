using System.Text.Json;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Codes of 4 bits against those of bitsandbytes, byte for byte, and what they stand for against
/// its tables times its scales in F32.
/// </summary>
[TestFixture]
public sealed unsafe class FourBitCodesTests
{
    private static readonly ReferenceFile s_file = ReferenceFile.Open("ops/quantize_4bit");

    private static IEnumerable<string> Cases => s_file.Cases.Select(c => c.Name);

    [TestCaseSource(nameof(Cases))]
    public void CodesAndScalesAreThoseOfBitsandbytes(string name)
    {
        ReferenceCase c = s_file.Cases.Single(each => each.Name == name);
        JsonElement p = c.Params;
        FourBitKind kind = p.GetProperty("quant_type").GetString() == "nf4"
            ? FourBitKind.Nf4 : FourBitKind.Fp4;
        bool nested = p.GetProperty("nested").GetBoolean();
        int[] shape = [.. p.GetProperty("shape").EnumerateArray().Select(e => e.GetInt32())];
        var form = new FourBitForm(
            shape[0], shape[1], p.GetProperty("blocksize").GetInt32(), nested ? 256 : 0);
        float[] w = Floats(c, "w");
        FourBitCodes codes;
        fixed (float* values = w) codes = FourBitCodes.Of(form, kind, DType.F32, values);
        // A negative zero is code 8 of FP4 to the CUDA kernel, and 0 to the CPU's.
        int zero = kind == FourBitKind.Fp4 ? 8 : 0;
        Assert.That(codes.Codes.SelectMany(Halves),
            Is.EqualTo(Floats(c, "packed").SelectMany(v => Halves((byte)v))));
        Assert.That(codes.Table, Is.EqualTo(Floats(c, "table")));
        IEnumerable<int> Halves(byte pair) =>
            ((int[])[pair >> 4, pair & 15]).Select(code => code == zero ? 0 : code);

        var back = new float[w.Length];
        codes.Unpack(0, back);
        if (!nested)
        {
            Assert.That(codes.Scales, Is.EqualTo(Floats(c, "absmax")));
            Assert.That(back, Is.EqualTo(Floats(c, "dequantised_f32")));
            return;
        }

        // The CPU code that made these has -1 as the first entry of the nested table.
        // Its mean was summed in floats, in the order of PyTorch's CPU code.
        float offset = Floats(c, "offset")[0];
        Assert.That(codes.Offset, Is.EqualTo(offset).Within(1).Ulps);
        Assert.That(codes.Scales, Is.EqualTo(Floats(c, "nested_absmax")).Within(1).Ulps);
        Assert.That(codes.ScaleTable!.Skip(1), Is.EqualTo(Floats(c, "nested_table").Skip(1)));
        Assert.That(codes.ScaleCodes, Is.EqualTo(Floats(c, "absmax_code").Select(v => (byte)v)));
        (codes with
        {
            ScaleTable = Floats(c, "nested_table"),
            Scales = Floats(c, "nested_absmax"),
            Offset = offset,
        }).Unpack(0, back);
        Assert.That(back, Is.EqualTo(Floats(c, "dequantised_f32")));
    }


    private static float[] Floats(ReferenceCase c, string name) =>
        c.Floats(name);
}
