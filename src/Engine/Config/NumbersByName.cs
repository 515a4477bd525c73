using System.Globalization;
using System.Text.Json;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// Numbers for names that match regular expressions, in an order: the first that matches counts.
/// PEFT's rank_pattern and alpha_pattern, and rules for learning rates.
/// </summary>
public sealed class NumbersByName
{
    private readonly (string Pattern, double Value)[] _list;
    private readonly Regex[] _ends, _parts;

    /// <exception cref="InputException">A pattern is no regular expression.</exception>
    public NumbersByName(IReadOnlyList<(string Pattern, double Value)> list)
    {
        _list = [.. list];
        _ends = [.. list.Select(item => PythonRegex.FullMatch($@"(?:.*\.)?(?:{item.Pattern})"))];
        _parts = [.. list.Select(item => PythonRegex.Search(item.Pattern))];
    }

    public static NumbersByName None { get; } = new([]);

    public int Count => _list.Length;

    public IReadOnlyList<(string Pattern, double Value)> List => _list;

    /// <summary>
    /// The number of the first pattern that matches a module's name, or what follows a dot in it;
    /// PEFT 0.21's rule, which is 0.14's but for a|b and ^.
    /// </summary>
    /// <exception cref="InputException">A regular expression takes too long.</exception>
    public double? OfModule(string name) =>
        Find((i, text) => _ends[i].IsMatch(text), name) is { } at ? _list[at].Value : null;

    /// <summary>
    /// The place of the first pattern that is found anywhere in a name, or that `is` says fits.
    /// </summary>
    /// <exception cref="InputException">A regular expression takes too long.</exception>
    public int? FindIn(string name, Func<string, bool?> fits) =>
        Find((i, text) => fits(_list[i].Pattern) ?? _parts[i].IsMatch(text), name);

    /// <summary>
    /// A JSON object. Alternatives are put into brackets: PEFT 0.14 splits its own pattern at them.
    /// </summary>
    public void Write(Utf8JsonWriter json)
    {
        json.WriteStartObject();
        foreach (var (pattern, value) in _list)
        {
            json.WritePropertyName(pattern.Contains('|') && !pattern.StartsWith('(')
                ? $"({pattern})" : pattern);
            json.WriteRawValue(PythonJson.Short(value));
        }

        json.WriteEndObject();
    }

    /// <summary>The same with every number multiplied.</summary>
    public NumbersByName Times(double factor) =>
        new([.. _list.Select(item => (item.Pattern, factor * item.Value))]);

    public override string ToString() =>
        string.Join(", ", _list.Select(item => FormattableString.Invariant(
            $"{item.Pattern}: {item.Value}")));

    private int? Find(Func<int, string, bool> matches, string name)
    {
        for (int i = 0; i < _list.Length; i++)
        {
            try
            {
                if (matches(i, name)) return i;
            }
            catch (RegexMatchTimeoutException failure)
            {
                throw new InputException($"the pattern {Messages.Quote(_list[i].Pattern)} takes too"
                    + $" long to match {Messages.Quote(name)}", failure);
            }
        }

        return null;
    }
}

/// <summary>How new adapters start, under PEFT's names (init_lora_weights).</summary>
/// <param name="Text">true, false, gaussian, pissa, pissa_niter_N or olora.</param>
public sealed record LoraStart(string Text)
{
    public const string Choices = "true, false, gaussian, pissa, pissa_niter_N or olora";

    private const string Steps = "pissa_niter_";

    public void Write(Utf8JsonWriter json)
    {
        if (IsBool) json.WriteBooleanValue(Text == "true");
        else json.WriteStringValue(Text);
    }

    public bool IsBool => Text is "true" or "false";

    public bool IsOlora => Text == "olora";

    /// <summary>Whether adapters start as a part of their weights, which then lack it.</summary>
    public bool Splits => IsOlora || Text.StartsWith("pissa", StringComparison.Ordinal);

    /// <summary>Steps that singular vectors are sought in; null for as many as are
    /// needed.</summary>
    public int? Iterations => Text.StartsWith(Steps, StringComparison.Ordinal)
        ? int.Parse(Text.AsSpan(Steps.Length), CultureInfo.InvariantCulture) : null;

    /// <summary>Null for anything that is not one.</summary>
    public static LoraStart? Parse(string text) => text.ToLowerInvariant() switch
    {
        "true" or "false" or "gaussian" or "pissa" or "olora" =>
            new LoraStart(text.ToLowerInvariant()),
        var steps when steps.StartsWith(Steps, StringComparison.Ordinal)
            && int.TryParse(steps.AsSpan(Steps.Length), NumberStyles.None,
                CultureInfo.InvariantCulture, out int count) && count <= 1000 =>
            new LoraStart(FormattableString.Invariant($"{Steps}{count}")),
        _ => null,
    };
}
