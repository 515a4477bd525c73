using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// How fast each trained tensor learns and how much it decays: learning_rates and weight_decays by
/// part or name, B and vectors faster with loraplus_lr_ratio (Hayou et al. 2024, in the groups of
/// PEFT's create_loraplus_optimizer), and what the Hugging Face Trainer does not decay.
/// </summary>
internal sealed class LearningRules(ParameterTable table, TrainArguments arguments)
{
    /// <exception cref="InputException">A rule is the first match of no tensor.</exception>
    public IReadOnlyList<TunedTensor> Apply(
        IEnumerable<(string Name, Shape Shape, DType Type)> tensors)
    {
        var rates = new Rules(arguments.LearningRates, "learning_rates", Fits);
        var decays = new Rules(arguments.WeightDecays, "weight_decays", Fits);
        List<TunedTensor> found = [];
        foreach (var (name, shape, type) in tensors)
        {
            double rate = rates.Find(name) is { } own ? own / arguments.LearningRate : 1;
            if (IsFast(name, shape)) rate *= arguments.LoraplusLrRatio ?? 1;
            double decay = decays.Find(name) ?? arguments.WeightDecay;
            bool isDecayed = Decays(name);
            found.Add(new TunedTensor(
                name, shape, type, isDecayed, rate, isDecayed ? decay : 0,
                IsEmbedding(name), PlaceOf(name)));
        }

        rates.MustBeUsed();
        decays.MustBeUsed();
        return found;
    }

    // PyTorch leaves alone what no gradient reaches, an adapter on a module that does not run too.
    private bool Decays(string name) =>
        table.Find(ParameterTable.OwnerOf(name)) is not { Idle: true }
        && (arguments.WeightDecayScope == DecayScope.All
            || (table.Find(name) is not { Decays: false }
                && !name.EndsWith(".lora_B.bias", StringComparison.Ordinal)));

    private TunedPlace PlaceOf(string name) => table.IsLookedUp(name) ? TunedPlace.LookedUp
        : table.IsInBlock(name) ? TunedPlace.Block : TunedPlace.Elsewhere;

    private static bool IsEmbedding(string name) =>
        name.EndsWith("embed_tokens.weight", StringComparison.Ordinal)
        || name.EndsWith("position_embedding.weight", StringComparison.Ordinal);

    private static bool IsFast(string name, Shape shape) =>
        shape.Rank == 1 || name.EndsWith(".lora_B.weight", StringComparison.Ordinal);

    // Whether a tensor belongs to a part; null where the word is none.
    private bool? Fits(string word, string name)
    {
        string owner = ParameterTable.OwnerOf(name);
        return word switch
        {
            "vision" => table.PartOf(name) == ModelPart.Vision,
            "audio" => table.PartOf(name) == ModelPart.Audio,
            "joiner" => table.PartOf(name) == ModelPart.Joiner,
            "decoder" => table.PartOf(name) == ModelPart.Decoder,
            "embeddings" => owner == table.Head + ".weight"
                || owner.EndsWith(".embed_tokens.weight", StringComparison.Ordinal),
            _ => null,
        };
    }

    private sealed class Rules(
        NumbersByName? numbers, string key, Func<string, string, bool?> fits)
    {
        private readonly HashSet<int> _used = [];

        public double? Find(string name)
        {
            if (numbers?.FindIn(name, word => fits(word, name)) is not { } at) return null;
            _used.Add(at);
            return numbers.List[at].Value;
        }

        public void MustBeUsed()
        {
            List<string> idle = [.. Enumerable.Range(0, numbers?.Count ?? 0)
                .Where(i => !_used.Contains(i))
                .Select(i => Messages.Quote(numbers!.List[i].Pattern))];
            if (idle.Count > 0)
                throw new InputException($"{key} {Messages.List(idle)}: matches nothing that is"
                    + " trained and that no rule before it matches; vision, joiner, decoder, audio,"
                    + " embeddings are parts, all else is a regular expression");
        }
    }
}
