using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The operations of linear attention against what the transformers library computes in double, and
/// what those data do not hold: packed sequences that must not know each other, states that go on
/// where the last call stopped.
/// </summary>
[TestFixture]
public sealed class LinearAttentionTests
{
    private const int KeyHeads = 2, ValueHeads = 4, KeyDim = 8, ValueDim = 6;
    private const int Row = (2 * KeyHeads * KeyDim) + (ValueHeads * ValueDim);
    private const double Tolerance = 1e-11;

    private static readonly DeltaRule s_rule = new(KeyHeads, ValueHeads, KeyDim, ValueDim);
    private static readonly ReferenceFile s_delta =
        ReferenceFile.Open("linear_attention/delta_rule");

    private static readonly ReferenceFile s_small = ReferenceFile.Open("linear_attention/small");

    // The state at the end is asked for by KeyDim tokens more, whose keys are 0 and which forget
    // nothing: query i, of length 1, reads row i. So its gradient is tested, too.
    [TestCase(1)]
    [TestCase(7)]
    [TestCase(64)]
    [TestCase(65)]
    [TestCase(130)]
    public void TheDeltaRuleAndItsGradientsEqualTheLibrary(int length)
    {
        string name = $"T{length}.";
        Value[] inputs = Inputs(name, length, readers: KeyDim);
        int all = length + KeyDim, cols = ValueHeads * ValueDim;
        // A query of 1 is divided by sqrt(1 + 1e-6) and sqrt(KeyDim).
        double scale = 1 / Math.Sqrt(KeyDim * (1 + 1e-6));
        double[] dOut = s_delta.Doubles(name + "d_out"), dState = s_delta.Doubles(name + "d_state");
        double[] state = s_delta.Doubles(name + "final_state"), dy = new double[2 * all * cols];
        double[] y = s_delta.Doubles(name + "out");
        var expected = new double[dy.Length];
        for (int i = 0; i < dy.Length; i++)
        {
            int b = i / cols / all, t = i / cols % all, c = i % cols;
            int at = (((b * length) + t) * cols) + c;
            int read = StateAt(b, c / ValueDim, t - length, c % ValueDim);
            dy[i] = t < length ? dOut[at] : dState[read] / scale;
            expected[i] = t < length ? y[at] : state[read] * scale;
        }

        using var device = new CpuDevice(2, 1L << 24, DType.F64);
        using var run = new OpRun(device, s_rule, inputs);
        run.Forward();
        OpTests.AreClose(run.Output, expected, Tolerance, "output and state");
        run.Want(_ => true);
        run.Backward(dy);
        double[] dQkv = run.Gradient(0), dGates = run.Gradient(1);
        double[] dq = s_delta.Doubles(name + "grad.q"), dk = s_delta.Doubles(name + "grad.k");
        double[] dv = s_delta.Doubles(name + "grad.v"), dg = s_delta.Doubles(name + "grad.g");
        double[] dBeta = s_delta.Doubles(name + "grad.beta");
        const int Keys = KeyHeads * KeyDim;
        for (int token = 0; token < 2 * length; token++)
        {
            int at = token + (token / length * KeyDim);
            double[] got = dQkv[(at * Row)..((at + 1) * Row)];
            double[] row =
            [
                .. dq[(token * Keys)..((token + 1) * Keys)],
                .. dk[(token * Keys)..((token + 1) * Keys)],
                .. dv[(token * cols)..((token + 1) * cols)],
            ];
            OpTests.AreClose(got, row, Tolerance, $"gradient of qkv, token {token}");
            for (int h = 0; h < ValueHeads; h++)
            {
                int gate = (at * 2 * ValueHeads) + h, of = (token * ValueHeads) + h;
                double b = Sigmoid(inputs[1].Data[gate]);
                double a = Sigmoid(inputs[1].Data[gate + ValueHeads]);
                Assert.That(dGates[gate], Is.EqualTo(dBeta[of] * b * (1 - b)).Within(Tolerance));
                Assert.That(
                    dGates[gate + ValueHeads], Is.EqualTo(-dg[of] * a).Within(Tolerance));
            }
        }
    }

    [TestCase(7)]
    [TestCase(65)]
    public void AStateGoesOnWhereItStopped(int length)
    {
        string name = $"T{length}.s0.";
        Value[] inputs = [.. Inputs(name, length), State(s_delta.Doubles(name + "initial_state"))];
        using var device = new CpuDevice(2, 1L << 24, DType.F64);
        using var run = new OpRun(device, s_rule, inputs);
        run.Forward(recorded: false);
        OpTests.AreClose(run.Output, s_delta.Doubles(name + "out"), Tolerance, "output");
        OpTests.AreClose(run.Input(5), s_delta.Doubles(name + "final_state"), Tolerance, "state");
        Assert.That(() => run.Forward(recorded: true), Throws.TypeOf<ShapeException>()
            .With.Message.EqualTo("delta_rule: state is changed in place, so that a run with it has no backward"));
    }

    // Any pieces, of no token, too, equal the whole.
    [Test]
    public void PiecesWithAStateEqualTheWhole()
    {
        const int Length = 9;
        int[] pieces = [4, 0, 1, 1, 3];
        OpCase rule = OpCases.All.Single(c => c.Name == "delta_rule");
        OpCase conv = OpCases.All.Single(c => c.Name == "causal_conv");
        using var device = new CpuDevice(1, 1L << 24, DType.F64);
        foreach (var (c, state) in ((OpCase, Value)[])[
            (rule, State(new double[ValueHeads * KeyDim * ValueDim])),
            (conv, Value.Float("state", [3, 5], new double[15]))])
        {
            Value[] whole = c.Inputs(Length);
            int starts = Array.FindIndex(whole, v => v.IsInteger);
            whole[starts] = Value.Int("cu_seqlens", 0, Length);
            using var run = new OpRun(device, c.Op, whole);
            run.Forward();
            var output = new List<double>();
            double[] kept = state.Data;
            int first = 0;
            foreach (int count in pieces)
            {
                Value[] piece =
                [
                    .. whole.Select((v, i) => i == starts ? Value.Int(v.Name, 0, count)
                        : v.Shape[0] == Length ? Rows(v, first, count) : v),
                    state with { Data = kept },
                ];
                using var step = new OpRun(device, c.Op, piece);
                step.Forward(recorded: false);
                output.AddRange(step.Output);
                kept = step.Input(piece.Length - 1);
                first += count;
            }

            OpTests.AreClose([.. output], run.Output, 1e-13, c.Name);
        }
    }

    // Two sequences, one of which changes: the other's results keep their bits.
    [TestCase("delta_rule", DType.F32, 300)]
    [TestCase("delta_rule_128", DType.F32, 100)]
    [TestCase("causal_conv", DType.F32, 30)]
    public void NothingLeaksFromSequenceToSequence(string name, DType type, int tokens)
    {
        using var device = new CpuDevice(2, 1L << 28, type);
        NothingLeaks(device, OpCases.All.Single(c => c.Name == name), tokens);
    }

    internal static void NothingLeaks(Device device, OpCase c, int tokens)
    {
        int first = tokens / 3;
        double[][] plain = Results(_ => false);
        foreach (bool changeFirst in (bool[])[true, false])
        {
            double[][] changed = Results(t => t < first == changeFirst);
            foreach (var (a, b) in plain.Zip(changed))
            {
                int cols = a.Length / tokens;
                Range kept = changeFirst ? (first * cols).. : ..(first * cols);
                Range other = changeFirst ? ..(first * cols) : (first * cols)..;
                Assert.That(b[kept], Is.EqualTo(a[kept]));
                Assert.That(b[other], Is.Not.EqualTo(a[other]));
            }
        }

        double[][] Results(Predicate<int> isChanged)
        {
            Value[] inputs = c.Inputs(tokens);
            int starts = Array.FindIndex(inputs, v => v.IsInteger);
            inputs[starts] = Value.Int("cu_seqlens", 0, first, tokens);
            for (int i = 0; i < inputs.Length; i++)
            {
                Value v = inputs[i];
                if (v.IsInteger || v.Shape[0] != tokens) continue;
                int cols = v.Data.Length / tokens;
                for (int e = 0; e < v.Data.Length; e++)
                    if (isChanged(e / cols)) v.Data[e] = -v.Data[e] + 0.5;
            }

            using var run = new OpRun(device, c.Op, inputs);
            run.Forward();
            run.Want(i => inputs[i].Shape[0] == tokens);
            run.Backward(Fill.Normal(3, run.Count));
            return
            [
                run.Output, .. Enumerable.Range(0, inputs.Length)
                    .Where(i => inputs[i].Shape[0] == tokens && run.HasGradient(i))
                    .Select(run.Gradient),
            ];
        }
    }

    // The gates of the library's layer: what they make of a, b, A_log and dt_bias must decay and
    // write like its g and beta do.
    [Test]
    public void GatesEqualTheLibrary()
    {
        const int Tokens = 18;
        double[] a = s_small.Doubles("gate.a"), b = s_small.Doubles("gate.b");
        double[] qkv = Fill.Normal(5, Tokens * Row);
        double[] Output(double[] gates, double[] aLog, double[] dtBias)
        {
            using var device = new CpuDevice(1, 1L << 24, DType.F64);
            using var run = new OpRun(device, s_rule,
            [
                Value.Float("qkv", [Tokens, Row], qkv),
                Value.Float("gates", [Tokens, 2 * ValueHeads], gates),
                Value.Float("a_log", [ValueHeads], aLog),
                Value.Float("dt_bias", [ValueHeads], dtBias), Value.Int("cu_seqlens", 0, Tokens),
            ]);
            run.Forward();
            return run.Output;
        }

        double[] expected = Output(
            Gates(s_small.Doubles("gate.g"), s_small.Doubles("gate.beta"), Tokens, 0),
            new double[ValueHeads], new double[ValueHeads]);
        double[] got = Output(SideBySide(b, a, Tokens), s_small.Doubles("gate.A_log"),
            s_small.Doubles("gate.dt_bias"));
        OpTests.AreClose(got, expected, Tolerance, "output");
    }

    [TestCase(1)]
    [TestCase(2)]
    [TestCase(3)]
    [TestCase(4)]
    [TestCase(11)]
    public void TheConvolutionEqualsTheLibrary(int length)
    {
        const int Channels = 5;
        string name = $"conv.T{length}.";
        Equals(new CausalConv(),
            [
                Value.Float("x", [2 * length, Channels], Across("x")),
                Value.Float("w", [Channels, 4], s_small.Doubles(name + "weight")),
                Value.Int("cu_seqlens", 0, length, 2 * length),
            ],
            Across("d_out"), Across("out"), Across("grad.x"),
            s_small.Doubles(name + "grad.weight"));

        // [2, channels, length] to [2 * length, channels].
        double[] Across(string what)
        {
            double[] from = s_small.Doubles(name + what), to = new double[from.Length];
            for (int i = 0; i < to.Length; i++)
            {
                int row = i / Channels, c = i % Channels;
                to[i] = from[(((row / length * Channels) + c) * length) + (row % length)];
            }

            return to;
        }
    }

    // The library keeps four inputs, the oldest of which nothing reads again.
    [Test]
    public void AStepOfTheConvolutionEqualsTheLibrary()
    {
        using var device = new CpuDevice(1, 1L << 24, DType.F64);
        using var run = new OpRun(device, new CausalConv(),
        [
            Value.Float("x", [2, 5], s_small.Doubles("conv.step.x")),
            Value.Float("w", [5, 4], s_small.Doubles("conv.step.weight")),
            Value.Int("cu_seqlens", 0, 1, 2), Value.Float("state", [6, 5], Kept("before")),
        ]);
        run.Forward(recorded: false);
        OpTests.AreClose(run.Output, s_small.Doubles("conv.step.out"), Tolerance, "output");
        Assert.That(run.Input(3), Is.EqualTo(Kept("after")));

        double[] Kept(string when)
        {
            double[] four = s_small.Doubles("conv.step.state_" + when);
            var kept = new double[2 * 3 * 5];
            for (int i = 0; i < kept.Length; i++)
                kept[i] = four[(((i / 15 * 5) + (i % 5)) * 4) + 1 + (i / 5 % 3)];
            return kept;
        }
    }

    [Test]
    public void NormsEqualTheLibrary()
    {
        Equals(new GatedRmsNorm(1e-6),
            [
                Small("gated_norm.x", "x"), Small("gated_norm.weight", "w"),
                Small("gated_norm.gate", "gate"),
            ],
            s_small.Doubles("gated_norm.d_out"), s_small.Doubles("gated_norm.out"),
            s_small.Doubles("gated_norm.grad.x"), s_small.Doubles("gated_norm.grad.weight"),
            s_small.Doubles("gated_norm.grad.gate"));
        Equals(new RmsNorm(1e-6, ZeroCentred: true),
            [Small("zero_centred_norm.x", "x"), Small("zero_centred_norm.weight", "w")],
            s_small.Doubles("zero_centred_norm.d_out"), s_small.Doubles("zero_centred_norm.out"),
            s_small.Doubles("zero_centred_norm.grad.x"),
            s_small.Doubles("zero_centred_norm.grad.weight"));

        static Value Small(string key, string name) =>
            Value.Float(name, s_small.Shape(key), s_small.Doubles(key));
    }

    // Tables with a row per token, as positions of three rows need them. The file has heads before
    // tokens, and either half of the angles.
    [TestCase("rope.same.")]
    [TestCase("rope.mixed.")]
    public void PartOfAHeadIsRotatedAsInTheLibrary(string name)
    {
        const int Tokens = 7, Heads = 2, Dim = 32, Turned = 16;
        Equals(new Rope(Dim, Turned),
            [
                Value.Float("x", [Tokens, Heads * Dim], ByToken("q")),
                Value.Int("positions", [.. Enumerable.Range(0, Tokens)]),
                Value.Float("cos", [Tokens, Turned / 2], Half("cos")),
                Value.Float("sin", [Tokens, Turned / 2], Half("sin")),
            ],
            ByToken("d_q_out"), ByToken("q_out"), ByToken("grad.q"));

        double[] ByToken(string what)
        {
            double[] from = s_small.Doubles(name + what), to = new double[from.Length];
            for (int i = 0; i < to.Length; i++)
                to[i] = from[
                    (((i / Dim % Heads * Tokens) + (i / Dim / Heads)) * Dim) + (i % Dim)];
            return to;
        }

        double[] Half(string what) =>
            [.. s_small.Doubles(name + what).Where((_, i) => i % Turned < Turned / 2)];
    }

    [Test]
    public void TheGateIsTheSecondHalfOfEachHead()
    {
        const int Rows = 3, Heads = 2, Dim = 5;
        double[] x = Fill.Normal(1, Rows * Heads * Dim), queries = Fill.Normal(2, 2 * x.Length);
        double[] dy = Fill.Normal(3, x.Length), y = new double[x.Length], dx = new double[x.Length];
        var dQueries = new double[queries.Length];
        for (int i = 0; i < x.Length; i++)
        {
            int at = (i / Dim * 2 * Dim) + Dim + (i % Dim);
            double s = Sigmoid(queries[at]);
            (y[i], dx[i], dQueries[at]) = (x[i] * s, dy[i] * s, dy[i] * x[i] * s * (1 - s));
        }

        Equals(new SigmoidGate(Dim),
            [
                Value.Float("x", [Rows, Heads * Dim], x),
                Value.Float("queries", [Rows, 2 * Heads * Dim], queries),
            ],
            dy, y, dx, dQueries);
    }

    [TestCase(0, 1, "cu_seqlens[0] is 1, expected to rise from 0 to 7, the tokens")]
    [TestCase(1, 8, "cu_seqlens[1] is 8, expected to rise from 0 to 7, the tokens")]
    [TestCase(1, -1, "cu_seqlens[1] is -1, expected to rise from 0 to 7, the tokens")]
    [TestCase(3, 6, "cu_seqlens[3] is 6, expected to rise from 0 to 7, the tokens")]
    public void WrongStartsAreNamed(int index, int wrong, string message)
    {
        foreach (string name in (string[])["delta_rule", "causal_conv"])
        {
            OpCase c = OpCases.All.Single(each => each.Name == name);
            Value[] inputs = c.Inputs(7);
            inputs.Single(v => v.IsInteger).Data[index] = wrong;
            using var device = new CpuDevice(1, 1L << 24);
            using var run = new OpRun(device, c.Op, inputs);
            Assert.That(() => run.Forward(), Throws.TypeOf<ShapeException>()
                .With.Message.EqualTo($"{name}: {message}"));
        }
    }

    // The inputs of a case of the file, its two rows packed, with tokens behind each that read the
    // state.
    private static Value[] Inputs(string name, int length, int readers = 0)
    {
        int all = length + readers, tokens = 2 * all;
        double[] q = s_delta.Doubles(name + "q"), k = s_delta.Doubles(name + "k");
        double[] v = s_delta.Doubles(name + "v");
        var qkv = new double[tokens * Row];
        for (int i = 0; i < qkv.Length; i++)
        {
            const int Keys = KeyHeads * KeyDim, Values = ValueHeads * ValueDim;
            int row = i / Row, c = i % Row, t = row % all, token = (row / all * length) + t;
            qkv[i] = t >= length ? (c < Keys && c % KeyDim == t - length ? 1 : 0)
                : c < Keys ? q[(token * Keys) + c]
                : c < 2 * Keys ? k[(token * Keys) + c - Keys]
                : v[(token * Values) + c - (2 * Keys)];
        }

        return
        [
            Value.Float("qkv", [tokens, Row], qkv),
            Value.Float("gates", [tokens, 2 * ValueHeads],
                Gates(
                    s_delta.Doubles(name + "g"), s_delta.Doubles(name + "beta"), length, readers)),
            Value.Float("a_log", [ValueHeads], new double[ValueHeads]),
            Value.Float("dt_bias", [ValueHeads], new double[ValueHeads]),
            Value.Int("cu_seqlens", 0, all, tokens),
        ];
    }

    // b and a of these beta and g where A_log and dt_bias are 0; readers forget nothing.
    private static double[] Gates(double[] g, double[] beta, int length, int readers)
    {
        int all = length + readers, tokens = g.Length / ValueHeads / length * all;
        double[] a = new double[tokens * ValueHeads], b = new double[a.Length];
        for (int i = 0; i < a.Length; i++)
        {
            int row = i / ValueHeads, t = row % all;
            int at = ((((row / all) * length) + t) * ValueHeads) + (i % ValueHeads);
            a[i] = t < length ? Math.Log(Math.Exp(-g[at]) - 1) : -1000;
            b[i] = t < length ? Math.Log(beta[at] / (1 - beta[at])) : 0;
        }

        return SideBySide(b, a, tokens);
    }

    private static double[] SideBySide(double[] left, double[] right, int rows)
    {
        int cols = left.Length / rows;
        return
        [
            .. Enumerable.Range(0, 2 * left.Length).Select(i =>
                (i / cols % 2 == 0 ? left : right)[(i / cols / 2 * cols) + (i % cols)]),
        ];
    }

    private static int StateAt(int row, int head, int key, int value) =>
        (((((row * ValueHeads) + head) * KeyDim) + Math.Max(0, key)) * ValueDim) + value;

    private static Value State(double[] data) =>
        Value.Float("state", [data.Length / ValueDim, ValueDim], data);

    private static Value Rows(Value v, int first, int count)
    {
        int cols = v.Data.Length / v.Shape[0];
        return v with
        {
            Shape = [count, .. v.Shape[1..]],
            Data = v.Data[(first * cols)..((first + count) * cols)],
        };
    }

    private static double Sigmoid(double x) => 1 / (1 + Math.Exp(-x));

    private static void Equals(
        Op op, Value[] inputs, double[] dy, double[] output, params double[][] gradients)
    {
        using var device = new CpuDevice(2, 1L << 24, DType.F64);
        using var run = new OpRun(device, op, inputs);
        run.Forward();
        run.Want(_ => true);
        run.Backward(dy);
        OpTests.AreClose(run.Output, output, Tolerance, "output");
        int[] differentiable = [.. Enumerable.Range(0, inputs.Length).Where(run.HasGradient)];
        for (int i = 0; i < gradients.Length; i++)
            OpTests.AreClose(
                run.Gradient(differentiable[i]), gradients[i], Tolerance, $"gradient {i}");
    }
}
