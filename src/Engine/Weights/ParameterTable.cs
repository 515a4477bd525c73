using System.Collections.Frozen;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Weights;

/// <summary>The parts of a model that are trained or left alone as a whole.</summary>
public enum ModelPart
{
    Decoder,
    Vision,

    /// <summary>What turns vision features into the decoder's: the resampler.</summary>
    Joiner,

    /// <summary>The audio encoder with its projection.</summary>
    Audio,
}

/// <summary>A parameter of a model, as its module declares it.</summary>
/// <param name="Name">Official name, as in state_dict.</param>
/// <param name="Shape">Official shape.</param>
/// <param name="Part">The part it belongs to.</param>
/// <param name="Decays">Whether weight decay applies, by the Hugging Face Trainer's rule.</param>
/// <param name="Fixed">A constant of the official class (requires_grad false): trained only as
/// part of a module in modules_to_save.</param>
/// <param name="Idle">Of a module that does not run: no gradient reaches it.</param>
public sealed record ModelParameter(
    string Name, Shape Shape, ModelPart Part, bool Decays, bool Fixed = false, bool Idle = false)
    : ExpectedTensor(Name, Shape);

/// <summary>
/// A linear layer y = x W^T (+ b) with W[Outputs, Inputs], by its official module name.
/// </summary>
/// <param name="NoAdapter">Why no adapter can sit on it; null where one can.</param>
public sealed record LinearModule(
    string Name, int Inputs, int Outputs, bool HasBias, string? NoAdapter = null)
{
    /// <summary>Whether it is an embedding: the matrix is W[Inputs, Outputs], rows are looked
    /// up.</summary>
    public bool IsTable { get; init; }

    /// <summary>Why its adapters are read and merged, but not trained; null where they
    /// are.</summary>
    public string? OnlyRead { get; init; }

    /// <summary>How many matrices lie behind each other in its parameter: those of experts; 0 where
    /// it is a module.</summary>
    public int Experts { get; init; }

    /// <summary>The name of its matrix.</summary>
    public string Weight { get; init; } = Name + ".weight";
}

/// <summary>
/// What a model's modules declared while they were built: all parameters under their official
/// names, in the order of PyTorch's state_dict, and the modules they belong to. Buffers that are
/// recomputed (rotary frequencies, the resampler's positions) are not stored and not listed.
/// </summary>
public sealed class ParameterTable
{
    private readonly List<LinearModule> _linears;
    private readonly Dictionary<string, string> _tied;
    private readonly string[] _untouched, _blocks;
    private readonly HashSet<string> _lookedUp;
    private readonly FrozenDictionary<string, ModelParameter> _byName;

    private ParameterTable(Builder builder)
    {
        All = builder.Parameters;
        Hosts = builder.Hosts;
        _linears = [.. Hosts.Where(host => !host.IsTable && host.OnlyRead is null)];
        _tied = builder.Tied;
        _untouched = [.. builder.Untouched];
        _blocks = [.. builder.Blocks];
        _lookedUp = builder.LookedUp;
        Head = builder.Head;
        Experts = builder.Experts;
        _byName = All.ToFrozenDictionary(tensor => tensor.Name, StringComparer.Ordinal);
        // Modules without parameters count too: a pattern that hits one stops PEFT.
        foreach (ModelParameter tensor in All)
            for (int dot = tensor.Name.LastIndexOf('.'); dot > 0;
                dot = tensor.Name.LastIndexOf('.', dot - 1))
                if (!builder.Modules.Add(tensor.Name[..dot])) break;
        Modules = [.. builder.Modules];
    }

    /// <summary>Every parameter, in the order of state_dict.</summary>
    public IReadOnlyList<ModelParameter> All { get; }

    public IEnumerable<string> Names => All.Select(tensor => tensor.Name);

    /// <summary>Numbers in all parameters.</summary>
    public long Count => All.Sum(tensor => tensor.Shape.Count);

    /// <summary>Linear layers, those that take no adapter among them.</summary>
    public IReadOnlyList<LinearModule> Linears => _linears;

    /// <summary>All that an adapter's targets may name: those, the embedding, and attentions that
    /// have one as a whole.</summary>
    public IReadOnlyList<LinearModule> Hosts { get; }

    /// <summary>Parameters that are matrices of experts, by their own names.</summary>
    public IReadOnlyList<LinearModule> Experts { get; }

    /// <summary>Every named module of the official model, in no particular order.</summary>
    public IReadOnlyList<string> Modules { get; }

    /// <summary>The linear layer that is the output head.</summary>
    public string? Head { get; }

    /// <summary>
    /// Modules that are another one's tensor used again, and have none of their own, by name, with
    /// the other's name.
    /// </summary>
    public IReadOnlyDictionary<string, string> Tied => _tied;

    public ModelParameter? Find(string name) => _byName.GetValueOrDefault(name);

    /// <summary>The part that a parameter, or an adapter's tensor, belongs to.</summary>
    public ModelPart? PartOf(string name)
    {
        string owner = OwnerOf(name);
        if (owner == Head + ".weight" && _tied.TryGetValue(Head!, out string? to))
            owner = to + ".weight";
        return (Find(owner) ?? Find(owner.Replace(".weight", "", StringComparison.Ordinal)))?.Part;
    }

    /// <summary>The parameter that an adapter's tensor belongs to; others are their own.</summary>
    public static string OwnerOf(string name) => name
        .Replace(".lora_A.", ".", StringComparison.Ordinal)
        .Replace(".lora_B.", ".", StringComparison.Ordinal)
        .Replace(".lora_magnitude_vector", ".weight", StringComparison.Ordinal)
        .Replace(".lora_embedding_A", ".weight", StringComparison.Ordinal)
        .Replace(".lora_embedding_B", ".weight", StringComparison.Ordinal)
        .Replace(AdapterLayout.TokensEnd, ".weight", StringComparison.Ordinal);

    /// <summary>
    /// Whether a tensor belongs to a part that the engine does not run and hands on as it is, such
    /// as the speech of the omni models.
    /// </summary>
    public bool IsUntouched(string name) => BeginsWithOne(_untouched, name);

    /// <summary>Whether a tensor belongs to a block, whose tensors can be streamed.</summary>
    public bool IsInBlock(string name) => BeginsWithOne(_blocks, name);

    /// <summary>Whether a tensor is a matrix of which each run looks up few rows.</summary>
    public bool IsLookedUp(string name) => _lookedUp.Contains(name);

    private static bool BeginsWithOne(string[] prefixes, string name) =>
        Array.Exists(prefixes, prefix => name.StartsWith(prefix, StringComparison.Ordinal));

    /// <summary>Takes what modules declare, in the order in which they do.</summary>
    public sealed class Builder
    {
        internal List<ModelParameter> Parameters { get; } = [];

        internal List<LinearModule> Hosts { get; } = [];

        internal HashSet<string> Modules { get; } = new(StringComparer.Ordinal);

        internal Dictionary<string, string> Tied { get; } = new(StringComparer.Ordinal);

        internal List<string> Untouched { get; } = [];

        internal List<string> Blocks { get; } = [];

        internal List<LinearModule> Experts { get; } = [];

        internal HashSet<string> LookedUp { get; } = new(StringComparer.Ordinal);

        public string? Head { get; set; }

        public void AddExperts(LinearModule matrices) => Experts.Add(matrices);

        public void Add(ModelParameter parameter) => Parameters.Add(parameter);

        public void Add(LinearModule linear) => Hosts.Add(linear);

        /// <summary>A module without parameters of its own.</summary>
        public void AddModule(string name) => Modules.Add(name);

        /// <summary>A module that is another one's tensor.</summary>
        public void Tie(string module, string to)
        {
            Modules.Add(module);
            Tied.Add(module, to);
        }

        /// <summary>Tensors whose names begin so may be there, and are not looked at.</summary>
        public void PassOver(string prefix) => Untouched.Add(prefix);

        /// <summary>Tensors whose names begin so belong to one block.</summary>
        public void AddBlock(string prefix) => Blocks.Add(prefix);

        /// <summary>A matrix of which each run looks up few rows.</summary>
        public void AddLookedUp(string name) => LookedUp.Add(name);

        public ParameterTable Build() => new(this);
    }
}
