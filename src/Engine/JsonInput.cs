using System.Text.Json;
using System.Text.Unicode;

namespace MiniCpmNative.Engine;

/// <summary>
/// Strict reading of JSON files the user gives: bounded size and depth, UTF-8, no duplicate keys,
/// and typed access whose errors name file, key path, what was expected and what is there. Null
/// counts as absent, as it does in Hugging Face's files.
/// </summary>
public static class JsonInput
{
    private const long DefaultMaxBytes = 16 << 20;
    private const int MaxDepth = 64;

    /// <summary>The root object of a file.</summary>
    /// <exception cref="InputException">
    /// Missing, unreadable, too large, or not a JSON object.
    /// </exception>
    public static JsonValue ReadObject(string path, long maxBytes = DefaultMaxBytes)
    {
        var root = Parse(path, InputFile.ReadAll(path, maxBytes));
        return root.IsObject ? root : throw root.Expected("an object");
    }

    /// <summary>Parses text that came from the named place (a file, or "file line 3").</summary>
    /// <exception cref="InputException">
    /// Not UTF-8, not JSON, nested too deeply, or duplicate keys.
    /// </exception>
    public static JsonValue Parse(string place, ReadOnlyMemory<byte> utf8)
    {
        if (utf8.Span.StartsWith("\uFEFF"u8)) utf8 = utf8[3..];
        if (utf8.IsEmpty) throw new InputException($"{place}: is empty, expected JSON");
        if (!Utf8.IsValid(utf8.Span)) throw new InputException($"{place}: is not UTF-8");
        try
        {
            var document =
                JsonDocument.Parse(utf8, new JsonDocumentOptions { MaxDepth = MaxDepth });
            var root = new JsonValue(place, "", document.RootElement);
            CheckText(root);
            return root;
        }
        catch (JsonException failure)
        {
            throw new InputException($"{place}: is not valid JSON at line"
                + $" {(failure.LineNumber ?? 0) + 1}, byte {(failure.BytePositionInLine ?? 0) + 1}"
                + $" ({JsonFault.Reason(utf8.Span, failure)})", failure);
        }
    }

    // JsonDocument keeps duplicate keys and decodes text only when asked;
    // both are settled here once.
    private static void CheckText(JsonValue value)
    {
        if (value.Element.ValueKind == JsonValueKind.String) _ = value.Text();
        if (value.Element.ValueKind == JsonValueKind.Array)
            foreach (var item in value.Items()) CheckText(item);
        if (value.Element.ValueKind != JsonValueKind.Object) return;
        var seen = new HashSet<string>(StringComparer.Ordinal);
        foreach (var (name, member) in value.Members())
        {
            if (!seen.Add(name)) throw member.Error("is there twice");
            CheckText(member);
        }
    }
}

/// <summary>
/// A value of a JSON file together with its file and key path, for typed reading.
/// </summary>
public readonly struct JsonValue
{
    internal JsonValue(string file, string path, JsonElement element) =>
        (File, Path, Element) = (file, path, element);

    public string File { get; }

    /// <summary>For instance vision_config.image_size or rows[3]; empty for the root.</summary>
    public string Path { get; }

    /// <summary>The raw element; null is never handed out by <see cref="Find"/>.</summary>
    public JsonElement Element { get; }

    public bool IsObject => Element.ValueKind == JsonValueKind.Object;

    public bool IsArray => Element.ValueKind == JsonValueKind.Array;

    public bool IsText => Element.ValueKind == JsonValueKind.String;

    public bool IsNumber => Element.ValueKind == JsonValueKind.Number;

    public bool IsBool => Element.ValueKind is JsonValueKind.True or JsonValueKind.False;

    /// <summary>A member that must be there and not null.</summary>
    /// <exception cref="InputException">
    /// This is no object, or the member is absent or null.
    /// </exception>
    public JsonValue this[string key] => Find(key)
        ?? throw new InputException($"{File}: key {Messages.Quote(Join(key))} is missing");

    /// <summary>A member, or null when it is absent or null.</summary>
    /// <exception cref="InputException">This is no object.</exception>
    public JsonValue? Find(string key)
    {
        if (!IsObject) throw Expected("an object");
        return Element.TryGetProperty(key, out var member) && member.ValueKind != JsonValueKind.Null
            ? new JsonValue(File, Join(key), member)
            : null;
    }

    /// <summary>Members in the order of the file, nulls included.</summary>
    /// <exception cref="InputException">
    /// This is no object, or a name is not valid Unicode.
    /// </exception>
    public IEnumerable<(string Name, JsonValue Value)> Members()
    {
        if (!IsObject) throw Expected("an object");
        foreach (var member in Element.EnumerateObject())
        {
            string name = NameOf(member);
            yield return (name, new JsonValue(File, Join(name), member.Value));
        }
    }

    /// <exception cref="InputException">This is no array.</exception>
    public IEnumerable<JsonValue> Items()
    {
        if (!IsArray) throw Expected("an array");
        int index = 0;
        foreach (var item in Element.EnumerateArray())
            yield return new JsonValue(File, $"{Path}[{index++}]", item);
    }

    /// <exception cref="InputException">
    /// Not text, or an escape that is no valid Unicode.
    /// </exception>
    public string Text()
    {
        if (!IsText) throw Expected("text");
        try
        {
            return Element.GetString()!;
        }
        catch (InvalidOperationException)
        {
            throw Error("has an unpaired surrogate escape");
        }
    }

    /// <exception cref="InputException">Not true or false.</exception>
    public bool Bool() => IsBool ? Element.GetBoolean() : throw Expected("true or false");

    /// <exception cref="InputException">Not a whole number in the range.</exception>
    public int Int(int least = int.MinValue, int most = int.MaxValue) => (int)Long(least, most);

    /// <exception cref="InputException">Not a whole number in the range.</exception>
    public long Long(long least = long.MinValue, long most = long.MaxValue)
    {
        if (IsNumber && Element.TryGetInt64(out long value) && value >= least && value <= most)
            return value;
        throw Expected((least, most) switch
        {
            (long.MinValue or int.MinValue, long.MaxValue or int.MaxValue) => "a whole number",
            (_, long.MaxValue or int.MaxValue) => $"a whole number from {Messages.Number(least)}",
            _ => $"a whole number from {Messages.Number(least)} to {Messages.Number(most)}",
        });
    }

    /// <exception cref="InputException">Not a finite number in the range.</exception>
    public double Number(double least = double.MinValue, double most = double.MaxValue)
    {
        if (IsNumber && Element.TryGetDouble(out double value) && double.IsFinite(value)
            && value >= least && value <= most)
            return value;
        throw Expected(FormattableString.Invariant($"{(least, most) switch
        {
            (double.MinValue, double.MaxValue) => "a number",
            (_, double.MaxValue) => $"a number from {least}",
            (double.MinValue, _) => $"a number up to {most}",
            _ => $"a number from {least} to {most}",
        }}"));
    }

    /// <summary>"file: key "a.b": problem", for the caller to throw.</summary>
    public InputException Error(string problem) => new(Path.Length == 0
        ? $"{File}: {problem}"
        : $"{File}: key {Messages.Quote(Path)} {problem}");

    /// <summary>An error that says what was expected and what is there.</summary>
    public InputException Expected(string expected) =>
        Error($"is {Description}, expected {expected}");

    // Files hold vocabularies and long arrays: only short values are shown.
    private string Description => Element.ValueKind switch
    {
        JsonValueKind.Object => "an object",
        JsonValueKind.Array => "an array",
        JsonValueKind.String => Shortened("text"),
        JsonValueKind.Number => Shortened("a long number"),
        _ => Element.GetRawText(),
    };

    private string Shortened(string otherwise)
    {
        string raw = Element.GetRawText();
        return raw.Length <= 60 ? Messages.OneLine(raw) : otherwise;
    }

    private string Join(string key) => Path.Length == 0 ? key : $"{Path}.{key}";

    private string NameOf(JsonProperty member)
    {
        try
        {
            return member.Name;
        }
        catch (InvalidOperationException)
        {
            throw Error("has a name with an unpaired surrogate escape");
        }
    }
}
