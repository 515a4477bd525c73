using System.Text.RegularExpressions;
using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// Adapters as other tools leave them, under the names that PEFT's save_pretrained gives: the
/// adapter's own name in the keys (lora_A.default.weight, of a state dict saved as it is), and
/// adapters of the decoder alone, whose modules begin at its root (model.layers.0...).
/// </summary>
internal static partial class ForeignAdapter
{
    private const string Prefix = AdapterLayout.Prefix, Layers = "layers.", Root = "model.";

    /// <summary>The tensors by the names PEFT would have saved them under.</summary>
    /// <exception cref="InputException">Several adapters stand in one file.</exception>
    public static Dictionary<string, StoredTensor> Named(SafetensorsFile file)
    {
        var tensors = new Dictionary<string, StoredTensor>(StringComparer.Ordinal);
        foreach (StoredTensor tensor in file.Tensors)
        {
            string name = Vector().Replace(
                Whole().Replace(Factor().Replace(tensor.Name, ".$1.$2"), "."), ".$1");
            if (!tensors.TryAdd(name, tensor))
                throw new InputException($"{file.Path}: holds {Messages.Quote(name)} of several "
                    + "adapters; save one of them alone");
        }

        return tensors;
    }

    /// <summary>
    /// The adapter with its modules' names in the whole model, where it is one of the decoder
    /// alone; null where it is not.
    /// </summary>
    public static (AdapterConfig Config, Dictionary<string, StoredTensor> Tensors)? OfDecoder(
        ParameterTable table, AdapterConfig config, Dictionary<string, StoredTensor> tensors)
    {
        var linears = table.Linears.Select(l => l.Name).ToHashSet(StringComparer.Ordinal);
        if (linears.FirstOrDefault(l => table.PartOf(l + ".weight") == ModelPart.Decoder
            && l.Contains("." + Layers, StringComparison.Ordinal)) is not { } inside) return null;
        string root = inside[..(inside.IndexOf("." + Layers, StringComparison.Ordinal) + 1)];
        const string endOfA = ".lora_A.weight";
        string[] modules = [.. tensors.Keys
            .Where(name => name.EndsWith(endOfA, StringComparison.Ordinal)
                && name.StartsWith(Prefix, StringComparison.Ordinal))
            .Select(name => name[Prefix.Length..^endOfA.Length])];
        if (modules.Length == 0 || root == Root
            || !modules.All(m => !linears.Contains(m) && linears.Contains(InModel(m)))) return null;
        string Renamed(string name) => name.StartsWith(Prefix, StringComparison.Ordinal)
            ? Prefix + InModel(name[Prefix.Length..]) : name;
        return (config with
        {
            Targets = Exactly([.. modules.Select(InModel)]),
            Exclude = null,
            LayersToTransform = null,
            LayersPattern = [],
        }, tensors.ToDictionary(
            pair => Renamed(pair.Key), pair => pair.Value, StringComparer.Ordinal));

        string InModel(string name) => name.StartsWith(Root, StringComparison.Ordinal)
            ? root + name[Root.Length..]
            : name.StartsWith("lm_head.", StringComparison.Ordinal) && table.Head is { } head
                ? head + name["lm_head".Length..] : name;
    }

    /// <summary>A pattern that matches these modules and no others.</summary>
    public static TargetModules Exactly(IReadOnlyList<string> modules) =>
        new(string.Join('|', modules
        .GroupBy(module => Number().Replace(module, "N"), StringComparer.Ordinal).Select(same =>
        {
            // One number of the name differs, its layer's; where more do, each stands by itself.
            string[] names = [.. same];
            var numbers = names.Select(name => Number().Matches(name)).ToArray();
            if (numbers[0].Count != 1) return string.Join('|', names.Select(Regex.Escape));
            string name = names[0];
            Match at = numbers[0][0];
            string chosen = string.Join('|', numbers.Select(number => number[0].Value));
            return Regex.Escape(name[..at.Index])
                + (names.Length == 1 ? chosen : $"({chosen})")
                + Regex.Escape(name[(at.Index + at.Length)..]);
        })));

    [GeneratedRegex(@"\.(lora_[AB])\.[^.]+\.(weight|bias)$")]
    private static partial Regex Factor();

    [GeneratedRegex(@"\.modules_to_save\.[^.]+\.")]
    private static partial Regex Whole();

    [GeneratedRegex(@"\.(lora_magnitude_vector|lora_embedding_[AB])(\.[^.]+)*$")]
    private static partial Regex Vector();

    [GeneratedRegex(@"(?<=\.)\d+(?=\.)")]
    private static partial Regex Number();
}
