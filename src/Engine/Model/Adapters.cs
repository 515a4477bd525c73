using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A low-rank adapter on one linear module: y += Scale * drop(x) A^T B^T with A[Rank, Inputs],
/// B[Outputs, Rank]. Index keys its dropout masks. IsDora: rows have magnitudes[Outputs] too
/// (<see cref="Kernels.Ops.DoraLinear"/>). HasBias: B has a bias[Outputs]. IsTable: it is an
/// embedding's, y[t] += Scale * A[ids[t]] B^T with A[Inputs, Rank]. Experts: of so many matrices
/// behind each other, as A and B are; 0 for one.
/// </summary>
public sealed record Adapter(string Module, int Index, int Rank, double Scale, int Inputs,
    int Outputs, bool IsDora = false, bool HasBias = false, bool IsTable = false, int Experts = 0)
{
    public int RowsOfA => IsTable ? Inputs : checked(Rank * Math.Max(1, Experts));

    public int RowsOfB => checked(Outputs * Math.Max(1, Experts));

    public string NameOfA => Module + AdapterLayout.EndOfA(IsTable);

    public string NameOfB => Module + AdapterLayout.EndOfB(IsTable);

    public string NameOfBias => Module + ".lora_B.bias";

    /// <summary>Numbers in it.</summary>
    public long Count => ((long)Rank * (Inputs + Outputs) * Math.Max(1, Experts))
        + (IsDora ? Outputs : 0) + (HasBias ? Outputs : 0);
}

/// <summary>
/// All adapters of a run, by the name of their module; Hu et al. 2021, as PEFT has them.
/// </summary>
public sealed class Adapters(IReadOnlyList<Adapter> list, double dropout)
{
    private readonly Dictionary<string, Adapter> _byModule = list.ToDictionary(a => a.Module);

    public static Adapters None { get; } = new([], 0);

    /// <summary>Those of an adapter's configuration, as its layout places them.</summary>
    public static Adapters Of(AdapterConfig config, AdapterLayout layout) => new(
        [.. layout.Targets.Select((module, i) => new Adapter(
            module.Name, i, layout.RankOf(module.Name), layout.ScaleOf(module.Name),
            module.Inputs, module.Outputs, config.UseDora, config.Bias == LoraBias.True,
            module.IsTable, module.Experts))],
        config.Dropout)
    { Tokens = layout.Tokens };

    public IReadOnlyList<Adapter> List { get; } = list;

    /// <summary>Tokens with trained rows of an embedding or of the head.</summary>
    public IReadOnlyList<TokenTarget> Tokens { get; private init; } = [];

    /// <summary>Share of the adapters' input that is dropped in training.</summary>
    public double Dropout { get; } = dropout;

    /// <summary>The adapter whose A or B a tensor is, or null.</summary>
    public Adapter? Owner(string tensor) =>
        tensor.EndsWith(".lora_A.weight", StringComparison.Ordinal)
        || tensor.EndsWith(".lora_B.weight", StringComparison.Ordinal)
            ? Find(tensor[..^".lora_A.weight".Length]) : null;

    public Adapter? Find(string module) => _byModule.GetValueOrDefault(module);

    public static string NameOfA(string module) => module + ".lora_A.weight";

    public static string NameOfB(string module) => module + ".lora_B.weight";

    public static string NameOfMagnitude(string module) => module + ".lora_magnitude_vector";

    /// <summary>
    /// PEFT's start: A uniform in +-1/sqrt(Inputs) (Kaiming with a = sqrt 5), or normal with
    /// standard deviation 1/Rank (gaussian); B zero, or uniform in +-1/sqrt(Rank) (false). The
    /// numbers depend on the seed and on each element's place only.
    /// </summary>
    /// <param name="trainables">Take the numbers.</param>
    /// <param name="seed">Of the random ones.</param>
    /// <param name="start">Which they are.</param>
    /// <param name="split">The weights that they start as a part of, or null.</param>
    /// <param name="rowNorms">The norms of a weight's rows, which DoRA's magnitudes start
    /// as.</param>
    public void Initialise(
        ParameterRanges trainables, ulong seed, LoraStart start, SplitWeights? split,
        Func<string, double[]> rowNorms)
    {
        foreach (Adapter adapter in List)
        {
            if (split?.Start(adapter.Module) is { } part)
            {
                trainables.Write(NameOfA(adapter.Module), part.A);
                trainables.Write(NameOfB(adapter.Module), part.B);
                continue;
            }

            int matrices = Math.Max(1, adapter.Experts);
            var a = new float[checked(adapter.Rank * adapter.Inputs * matrices)];
            var b = new float[checked(adapter.Outputs * adapter.Rank * matrices)];
            if (adapter.IsTable)
            {
                // Of a table A begins as zero, and B does not.
                if (start.Text == "false") FillNormal(a, 1, adapter, 0, seed);
                FillNormal(b, 1, adapter, 1, seed);
            }
            else
            {
                if (start.Text == "gaussian") FillNormal(a, 1.0 / adapter.Rank, adapter, 0, seed);
                else FillUniform(a, 1 / Math.Sqrt(adapter.Inputs), adapter, 0, seed);
                if (start.Text == "false")
                    FillUniform(b, 1 / Math.Sqrt(adapter.Rank), adapter, 1, seed);
            }

            trainables.Write(adapter.NameOfA, a);
            trainables.Write(adapter.NameOfB, b);
            if (adapter.HasBias) trainables.Write(adapter.NameOfBias, new float[adapter.Outputs]);
            if (adapter.IsDora)
                trainables.Write(NameOfMagnitude(adapter.Module), [.. rowNorms(
                    adapter.Module + ".weight").Select(norm => (float)norm)]);
        }
    }

    private static void FillUniform(
        float[] values, double bound, Adapter adapter, uint which, ulong seed)
    {
        for (int i = 0; i < values.Length; i++)
            values[i] = (float)(((2 * Unit(Draw(i, adapter, which, seed).X0)) - 1) * bound);
    }

    // Box and Muller 1958.
    private static void FillNormal(
        float[] values, double deviation, Adapter adapter, uint which, ulong seed)
    {
        for (int i = 0; i < values.Length; i++)
        {
            var bits = Draw(i, adapter, which, seed);
            values[i] = (float)(deviation * Math.Sqrt(-2 * Math.Log(Unit(bits.X0)))
                * Math.Cos(2 * Math.PI * Unit(bits.X1)));
        }
    }

    // The layer numbers of dropout are the indices; these are others.
    private static (uint X0, uint X1, uint X2, uint X3) Draw(
        int element, Adapter adapter, uint which, ulong seed) => Philox.Draw(
        ((uint)element, ~(uint)adapter.Index, which, 0), ((uint)seed, (uint)(seed >> 32)));

    // In (0, 1).
    private static double Unit(uint bits) => (bits + 0.5) / 4294967296.0;
}
