using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// How much is computed again, layer by layer: an amount of 0 keeps everything, the largest keeps
/// the inputs of layers. In between each layer of the decoder goes from one kind to the next, the
/// first ones first, so that any memory can be filled; the vision tower, whose layers keep all or
/// their input, follows the decoder's MLPs. Results are the same to the bit.
/// </summary>
public sealed class Recomputation(int decoderLayers, int visionLayers)
{
    private int _amount;

    /// <summary>For a model that never learns.</summary>
    public static Recomputation None { get; } = new(0, 0);

    public int Most => (3 * decoderLayers) + visionLayers;

    public int Amount
    {
        get => _amount;
        set => _amount = value >= 0 && value <= Most ? value
            : throw new ArgumentOutOfRangeException(nameof(value), value, $"at most {Most}");
    }

    /// <summary>The amount at which every layer is of this kind.</summary>
    public int Of(Recompute kind) => kind switch
    {
        Recompute.Auto => 0,
        Recompute.Block => Most,
        _ => (kind - Recompute.Nothing) * decoderLayers,
    };

    public Recompute Decoder(int layer)
    {
        if (_amount == 0) return Recompute.Nothing;
        int before = 2 * decoderLayers;
        if (_amount > before)
            return layer < _amount - before - visionLayers ? Recompute.Block : Recompute.Mlp;
        return Recompute.Nothing + (_amount / decoderLayers)
            + (layer < _amount % decoderLayers ? 1 : 0);
    }

    public bool Vision(int layer) => layer < _amount - (2 * decoderLayers);

    /// <summary>In words.</summary>
    public override string ToString()
    {
        if (_amount == 0) return "nothing is computed again in backward";
        if (_amount == Most) return "every layer is computed again in backward";
        var kinds = Enumerable.Range(0, decoderLayers).Select(Decoder).CountBy(k => k)
            .Where(k => k.Key != Recompute.Nothing).Select(k => $"{Name(k.Key)} of {k.Value}");
        int vision = Enumerable.Range(0, visionLayers).Count(Vision);
        return "computed again in backward: " + string.Join(", ", kinds)
            + $" of {decoderLayers} decoder layers"
            + (vision > 0 ? $", {vision} of {visionLayers} vision layers" : "");
    }

    private static string Name(Recompute kind) => kind switch
    {
        Recompute.Norms => "norms",
        Recompute.Mlp => "norms and MLP",
        _ => "all",
    };
}
