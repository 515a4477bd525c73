using System.Text.Json;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// PEFT's layer_replication: ranges [Begin, End) of the decoder's layers, run one after the other,
/// so that a deeper model comes of the same weights: [[0, 3], [2, 4]] runs layers 0 1 2 2 3. Each
/// copy has adapters of its own, numbered anew.
/// </summary>
public sealed class LayerRanges
{
    public const string Form = "ranges of layers as [[0, 3], [2, 4]], their ends not included";

    private readonly (int Begin, int End)[] _ranges;

    private LayerRanges((int Begin, int End)[] ranges) => _ranges = ranges;

    /// <summary>Of each layer that runs the one whose weights it has.</summary>
    public IReadOnlyList<int> Layers =>
        [.. _ranges.SelectMany(r => Enumerable.Range(r.Begin, r.End - r.Begin))];

    /// <summary>Null for anything that is none.</summary>
    public static LayerRanges? Of(JsonElement json)
    {
        if (json.ValueKind != JsonValueKind.Array || json.GetArrayLength() == 0) return null;
        var ranges = new List<(int, int)>();
        foreach (JsonElement range in json.EnumerateArray())
        {
            if (range.ValueKind != JsonValueKind.Array || range.GetArrayLength() != 2
                || range[0].ValueKind != JsonValueKind.Number
                || !range[0].TryGetInt32(out int begin)
                || range[1].ValueKind != JsonValueKind.Number || !range[1].TryGetInt32(out int end)
                || begin < 0 || end <= begin || end > 1 << 16)
                return null;
            ranges.Add((begin, end));
        }

        return new LayerRanges([.. ranges]);
    }

    public void Write(Utf8JsonWriter json)
    {
        json.WriteStartArray();
        foreach (var (begin, end) in _ranges)
        {
            json.WriteStartArray();
            json.WriteNumberValue(begin);
            json.WriteNumberValue(end);
            json.WriteEndArray();
        }

        json.WriteEndArray();
    }

    public override string ToString() =>
        $"[{string.Join(", ", _ranges.Select(r => $"[{r.Begin}, {r.End}]"))}]";
}
