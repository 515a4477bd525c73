using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Linear attention on the CUDA device, beside the cases that all operations pass: packed sequences
/// that must not know each other, and the states of generation.
/// </summary>
[TestFixture]
public sealed class CudaLinearAttentionTests
{
    private CudaUnderTest _cuda = null!;

    [OneTimeSetUp]
    public void Make() => _cuda = new();

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCase("delta_rule", DType.F32, 150)]
    [TestCase("delta_rule", DType.BF16, 150)]
    [TestCase("delta_rule_128", DType.BF16, 90)]
    // A block's last tokens need the one behind it and not the next two, another sequence's.
    [TestCase("causal_conv", DType.F32, 99)]
    [TestCase("causal_conv_whole", DType.BF16, 99)]
    public void NothingLeaksFromSequenceToSequence(string name, DType type, int tokens)
    {
        OpCase c = OpCases.All.Single(each => each.Name == name);
        LinearAttentionTests.NothingLeaks(CudaOpTests.Prepare(_cuda.Device(type), c), c, tokens);
    }

    // Two sequences in pieces, one of them of no token, equal the CPU's whole ones; so does the
    // state at the end.
    [TestCase("delta_rule")]
    [TestCase("delta_rule_128")]
    [TestCase("causal_conv")]
    [TestCase("causal_conv_whole")]
    public void PiecesWithAStateEqualTheWhole(string name)
    {
        (int First, int Second)[] pieces = [(66, 5), (0, 1), (1, 1), (3, 70)];
        OpCase c = OpCases.All.Single(each => each.Name == name);
        int firsts = pieces.Sum(p => p.First), seconds = pieces.Sum(p => p.Second);
        Value[] whole = c.Inputs(firsts + seconds);
        int starts = Array.FindIndex(whole, v => v.IsInteger);
        whole[starts] = Value.Int("cu_seqlens", 0, firsts, firsts + seconds);
        int[] state = c.Op is DeltaRule rule
            ? [2 * rule.ValueHeads * rule.KeyDim, rule.ValueDim] : [6, whole[0].Shape[1]];
        double[] kept = new double[state[0] * state[1]], zeros = [.. kept];
        using var wide = new CpuDevice(1, 1L << 26, DType.F64);
        using var exact = new OpRun(wide, c.Op, [.. whole, Value.Float("state", state, zeros)]);
        exact.Forward(recorded: false);
        double[] expected = exact.Output;
        int first = 0, second = 0, cols = expected.Length / (firsts + seconds);
        foreach (var (ofFirst, ofSecond) in pieces)
        {
            Value[] piece =
            [
                .. whole.Select((v, i) => i == starts
                    ? Value.Int(v.Name, 0, ofFirst, ofFirst + ofSecond)
                    : v.Shape[0] != firsts + seconds ? v
                    : v with
                    {
                        Shape = [ofFirst + ofSecond, .. v.Shape[1..]],
                        Data = [.. Rows(v.Data, v.Shape[1])],
                    }),
                Value.Float("state", state, kept),
            ];
            using var run = new OpRun(_cuda.Device(DType.F32), c.Op, piece);
            run.Forward(recorded: false);
            double[] y = [.. Rows(expected, cols)];
            OpTests.AreClose(run.Output, y, 1e-5, $"{name} at {first} and {second}");
            kept = run.Input(piece.Length - 1);
            (first, second) = (first + ofFirst, second + ofSecond);

            IEnumerable<double> Rows(double[] all, int width) =>
                all[(first * width)..((first + ofFirst) * width)].Concat(
                    all[((firsts + second) * width)..((firsts + second + ofSecond) * width)]);
        }

        OpTests.AreClose(kept, exact.Input(whole.Length), 1e-5, "state");
    }

    // Keys and queries of almost no length, and gates so open that e^a is no float.
    [TestCase(DType.F32)]
    [TestCase(DType.BF16)]
    public void WhatIsRareAgrees(DType type)
    {
        OpCase c = OpCases.All.Single(each => each.Name == "delta_rule");
        var rule = (DeltaRule)c.Op;
        Value[] inputs = c.Inputs(7);
        int cols = inputs[0].Shape[1], units = 2 * rule.KeyHeads * rule.KeyDim;
        for (int i = 0; i < inputs[0].Data.Length; i++)
            if (i % cols < units) inputs[0].Data[i] /= 1024;
        for (int token = 0; token < 7; token += 3)
            inputs[1].Data[(2 * token * rule.ValueHeads) + rule.ValueHeads] = 100;
        CudaOpTests.Compare(_cuda.Device(type), c, type, c.Op, inputs, null, "rare");
    }

    // Three sequences that one chunk would hold, and keys of whole vectors in rows that are none.
    [TestCase(DType.F32)]
    [TestCase(DType.BF16)]
    public void ShortSequencesAgree(DType type)
    {
        const int Tokens = 7, Keys = 8, Values = 6, Row = (2 * Keys) + Values;
        OpCase c = OpCases.All.Single(each => each.Name == "delta_rule");
        Value[] inputs =
        [
            Value.Float("qkv", [Tokens, Row], Fill.Normal(1, Tokens * Row)),
            Value.Float("gates", [Tokens, 2], Fill.Normal(2, Tokens * 2)),
            Value.Float("a_log", [1], [-4]), Value.Float("dt_bias", [1], [0.5]),
            Value.Int("cu_seqlens", 0, 2, 3, Tokens),
        ];
        CudaOpTests.Compare(_cuda.Device(type), c, type, new DeltaRule(1, 1, Keys, Values), inputs,
            null, "short");
    }

    [TestCase("delta_rule")]
    [TestCase("causal_conv")]
    public void AStateHasNoGradient(string name)
    {
        OpCase c = OpCases.All.Single(each => each.Name == name);
        int[] state = c.Op is DeltaRule ? [3 * 4 * 8, 6] : [9, 5];
        using var run = new OpRun(_cuda.Device(DType.F32), c.Op,
            [.. c.Inputs(7), Value.Float("state", state, new double[state[0] * state[1]])]);
        Assert.That(() => run.Forward(recorded: true), Throws.TypeOf<ShapeException>()
            .With.Message.EqualTo(
                $"{name}: state is changed in place, so that a run with it has no backward"));
    }

    // What the kernels have room for; the CPU takes any.
    [Test]
    public void KeyHeadsThatAreTooLargeAreRefused()
    {
        using var run = new OpRun(_cuda.Device(DType.F32), new DeltaRule(1, 1, 129, 4),
        [
            Value.Float("qkv", [1, 262], new double[262]),
            Value.Float("gates", [1, 2], new double[2]), Value.Float("a_log", [1], [0]),
            Value.Float("dt_bias", [1], [0]), Value.Int("cu_seqlens", 0, 1),
        ]);
        Assert.That(() => run.Forward(), Throws.TypeOf<ShapeException>().With.Message.EqualTo(
            "delta_rule: key heads of 129 columns, expected 1 to 128 on a GPU"));
    }
}
