using System.Text.Json;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// PEFT's trainable_token_indices: tokens whose rows of the embedding (or of the head) are trained
/// while the others stay: a list of ids, of embed_tokens, or an object of modules with such lists.
/// </summary>
public sealed class TokenIndices
{
    public const string Form =
        "token ids, of embed_tokens, as [151700, 151701], or an object of modules with such lists";

    private const string Embedding = "embed_tokens";

    private readonly bool _isList;

    private TokenIndices(bool isList,
        IReadOnlyList<(string Module, IReadOnlyList<int> Ids)> list) =>
        (_isList, List) = (isList, list);

    /// <summary>Modules, by the end of their name, and their tokens.</summary>
    public IReadOnlyList<(string Module, IReadOnlyList<int> Ids)> List { get; }

    /// <summary>Null for anything that is none.</summary>
    public static TokenIndices? Of(JsonElement json)
    {
        if (json.ValueKind == JsonValueKind.Array)
            return Ids(json) is { } own ? new(true, [(Embedding, own)]) : null;
        if (json.ValueKind != JsonValueKind.Object) return null;
        var list = new List<(string, IReadOnlyList<int>)>();
        foreach (var member in json.EnumerateObject())
        {
            if (Ids(member.Value) is not { } ids || member.Name.Length == 0) return null;
            list.Add((member.Name, ids));
        }

        return list.Count > 0 ? new(false, list) : null;
    }

    public void Write(Utf8JsonWriter json)
    {
        if (!_isList) json.WriteStartObject();
        foreach (var (module, ids) in List)
        {
            if (!_isList) json.WritePropertyName(module);
            json.WriteStartArray();
            foreach (int id in ids) json.WriteNumberValue(id);
            json.WriteEndArray();
        }

        if (!_isList) json.WriteEndObject();
    }

    public override string ToString() => string.Join("; ", List.Select(item =>
        $"{item.Module}: {string.Join(", ", item.Ids)}"));

    // Each once: two rows for one token would have no meaning.
    private static List<int>? Ids(JsonElement json)
    {
        if (json.ValueKind != JsonValueKind.Array || json.GetArrayLength() == 0) return null;
        var ids = new List<int>();
        foreach (JsonElement item in json.EnumerateArray())
        {
            if (item.ValueKind != JsonValueKind.Number || !item.TryGetInt32(out int id) || id < 0
                || ids.Contains(id)) return null;
            ids.Add(id);
        }

        return ids;
    }
}
