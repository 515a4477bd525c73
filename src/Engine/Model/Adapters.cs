using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A low-rank adapter on one linear module: y += Scale * drop(x) A^T B^T with A[Rank, Inputs],
/// B[Outputs, Rank]. Index keys its dropout masks.
/// </summary>
public sealed record Adapter(string Module, int Index, int Rank, double Scale, int Inputs,
    int Outputs);

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
            module.Name, i, config.Rank, config.Scale, module.Inputs, module.Outputs))],
        config.Dropout);

    public IReadOnlyList<Adapter> List { get; } = list;

    /// <summary>Share of the adapters' input that is dropped in training.</summary>
    public double Dropout { get; } = dropout;

    public Adapter? Find(string module) => _byModule.GetValueOrDefault(module);

    public static string NameOfA(string module) => module + ".lora_A.weight";

    public static string NameOfB(string module) => module + ".lora_B.weight";

    /// <summary>
    /// PEFT's start: A uniform in +-1/sqrt(Inputs) (Kaiming with a = sqrt 5), B zero. The numbers
    /// depend on the seed and on each element's place only.
    /// </summary>
    public void Initialise(Trainables trainables, ulong seed)
    {
        foreach (Adapter adapter in List)
        {
            var a = new float[adapter.Rank * adapter.Inputs];
            double bound = 1 / Math.Sqrt(adapter.Inputs);
            for (int i = 0; i < a.Length; i++)
            {
                // The layer numbers of dropout are the indices; these are others.
                uint bits = Philox.Draw(
                    ((uint)i, ~(uint)adapter.Index, 0, 0), ((uint)seed, (uint)(seed >> 32))).X0;
                a[i] = (float)(((2 * (bits + 0.5) / 4294967296.0) - 1) * bound);
            }

            trainables.Write(NameOfA(adapter.Module), a);
            trainables.Write(NameOfB(adapter.Module), new float[adapter.Outputs * adapter.Rank]);
        }
    }
}
