using System.Globalization;
using System.Reflection;
using System.Text.Json;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// A value as it was given: a JSON value, or the words after a name on the command line (none for a
/// bare --name); relative paths start at Folder.
/// </summary>
internal sealed record Given(JsonElement? Json, IReadOnlyList<string>? Words, string Folder)
{
    public TrainKey? Key { get; init; }

    public object? Value { get; init; }

    /// <summary>
    /// The value as one text, for messages and for comparing with neutral values.
    /// </summary>
    public string Plain() => Json switch
    {
        { ValueKind: JsonValueKind.String } text => text.GetString()!,
        { } value => value.GetRawText(),
        null => Words!.Count == 0 ? "true" : string.Join(' ', Words),
    };
}

/// <summary>Turns given values into the types of a configuration record's properties.</summary>
internal static class TrainValues
{
    /// <exception cref="InputException">Wrong kind, spelling or range; without the source's
    /// name.</exception>
    public static object? Convert(TrainKey key, Given given)
    {
        bool isNull = given.Json is { ValueKind: JsonValueKind.Null };
        if (isNull && key.Optional) return null;
        if (!key.IsList && given.Words is { Count: > 1 })
            throw Wrong(key, given, "one value");
        return key.Type switch
        {
            var type when type == typeof(bool) => Boolean(key, given),
            var type when type == typeof(int) => (int)Whole(key, given),
            var type when type == typeof(long) => Whole(key, given),
            var type when type == typeof(double) => Number(key, given),
            var type when type == typeof(string) => Words(key, given),
            var type when type == typeof(DataSources) => Sources(key, given),
            var type when type == typeof(Interval) => Steps(key, given),
            var type when type == typeof(MemoryLimit) => Limit(key, given),
            var type when type == typeof(ResumePoint) => Resume(key, given),
            var type when type == typeof(TargetModules) => Targets(key, given),
            var type when type == typeof(NumbersByName) => NumbersByName(key, given),
            var type when type == typeof(LoraStart) => Start(key, given),
            var type when type == typeof(LayerRanges) => Ranges(key, given),
            var type when type == typeof(TokenIndices) => Tokens(key, given),
            var type when type == typeof(IReadOnlyList<string>) => Names(key, given),
            var type when type == typeof(IReadOnlyList<int>) => Layers(key, given),
            var type when type == typeof(ScheduleOptions) => Options(key, given),
            var type when type == typeof(ReportTo) => Reports(key, given),
            var type => Choice(key, given, type),
        };
    }

    private static InputException Wrong(TrainKey key, Given given, string expected) =>
        given.Words is { Count: 0 }
            ? new($"{key.Name} has no value, expected {expected}")
            : new($"{key.Name} is {Messages.Quote(given.Plain())}, expected {expected}");

    private static bool Boolean(TrainKey key, Given given) =>
        given.Plain().ToLowerInvariant() switch
        {
            "true" or "1" or "yes" or "y" or "t" => true,
            "false" or "0" or "no" or "n" or "f" => false,
            _ => throw Wrong(key, given, "true or false"),
        };

    private static double Number(TrainKey key, Given given)
    {
        // A JSON string is no number, so that a misplaced value is not read as one by luck.
        bool isNumber = given.Json is null or { ValueKind: JsonValueKind.Number };
        if (given.Words is { Count: 0 } || !isNumber
            || !double.TryParse(
                given.Plain(), NumberStyles.Float, CultureInfo.InvariantCulture, out double value))
            throw Wrong(key, given, "a number");
        // Not a comparison with bounds alone: NaN fails all of them.
        if (!double.IsFinite(value) || !key.Rule.Allows(value))
            throw Wrong(key, given, "a number " + key.Rule.Range(value));
        return value;
    }

    private static long Whole(TrainKey key, Given given)
    {
        double value = Number(key, given);
        return value == Math.Floor(value)
            ? (long)value
            : throw Wrong(key, given, "a whole number " + key.Rule.Range(value));
    }

    private static Interval Steps(TrainKey key, Given given)
    {
        double value = Number(key, given);
        return value < 1 || value == Math.Floor(value)
            ? new Interval(value)
            : throw Wrong(key, given, "a whole number of steps, or a share of all steps below 1");
    }

    private static string? Words(TrainKey key, Given given)
    {
        bool isText = given.Json is null or { ValueKind: JsonValueKind.String };
        if (!isText || given.Words is { Count: 0 })
            throw Wrong(key, given, key.Rule.Path ? "a path" : "a text");
        string text = given.Plain();
        if (text.Length == 0)
            return key.Optional ? null : throw Wrong(key, given, "a text that is not empty");
        if (!key.Rule.Path) return text;
        if (text.Contains('\0')) throw Wrong(key, given, "a path");
        return Path.GetFullPath(text, given.Folder);
    }

    private static DataSources? Sources(TrainKey key, Given given)
    {
        var paths = new List<string>();
        foreach (var item in Items(key, given))
        {
            string? text = item.ValueKind == JsonValueKind.String ? item.GetString() : null;
            if (text is null || text.Any(char.IsControl))
                throw Wrong(key, given, "a path, or a list of paths");
            if (text.Length > 0) paths.Add(Path.GetFullPath(text, given.Folder));
        }

        return paths.Count > 0 ? new DataSources(paths) : null;
    }

    private static MemoryLimit Limit(TrainKey key, Given given) =>
        MemoryLimit.Parse(given.Plain())
        ?? throw Wrong(key, given, "memory such as 24GiB or 24GB, or a share up to 1");

    private static ResumePoint? Resume(TrainKey key, Given given) =>
        given.Plain().ToLowerInvariant() switch
        {
            "true" => new ResumePoint(null),
            "false" or "none" => null,
            _ => Words(key, given) is { } path ? new ResumePoint(path) : null,
        };

    private static object Choice(TrainKey key, Given given, Type type)
    {
        // Case and separators vary between the names of the field (WarmupLR, warmup_lr).
        static string Letters(string text) =>
            text.Replace("_", "").Replace("-", "").ToLowerInvariant();

        string text = given.Json is { ValueKind: JsonValueKind.Array } array
            && array.GetArrayLength() == 1
            ? array[0].ToString()
            : given.Plain();
        foreach (string name in Enum.GetNames(type))
            if (Letters(name) == Letters(text)) return Enum.Parse(type, name);
        throw Wrong(key, given, string.Join(", ", Enum.GetNames(type).Select(TrainKeys.SnakeCase))
            + Words(key.Name, Letters(text)));

        static string Words(string key, string letters) => (key, letters) switch
        {
            ("optim", "adamwhf") => "; adamw_torch is the same",
            ("optim", "adamwtorch4bit" or "adamwtorch8bit") =>
                "; adamw_8bit has the fewest bits of AdamW",
            ("optim", "lomo" or "adalomo" or "apolloadamw" or "apolloadamwlayerwise") =>
                "; of these sgd keeps nothing, lion_8bit a byte a number",
            ("optim", _) when letters.StartsWith("galore", StringComparison.Ordinal) =>
                "; gradients of low rank are LoRA's (use_lora), the least memory AdamW takes is "
                + "paged_adamw_8bit's",
            ("optim", _) when letters.StartsWith("schedulefree", StringComparison.Ordinal) =>
                "; without a schedule is lr_scheduler_type=constant",
            ("report_to", _) => "; beside them train_log.jsonl and report.html are always written, "
                + "which wandb and swanlab can take in (offline)",
            _ => "",
        };
    }

    // One, or several in a list, of which none must stand alone.
    private static ReportTo Reports(TrainKey key, Given given)
    {
        ReportTo[] all = [.. Items(key, given).Select(item => (ReportTo)Choice(
            key, given with { Json = item, Words = null }, typeof(ReportTo)))];
        if (all.Length > 1 && all.Contains(ReportTo.None)) throw Wrong(key, given, "none alone");
        return all.Contains(ReportTo.All) ? ReportTo.All
            : all.Contains(ReportTo.Tensorboard) ? ReportTo.Tensorboard : ReportTo.None;
    }

    private static TargetModules? Targets(TrainKey key, Given given)
    {
        bool isPattern = given.Json is { ValueKind: JsonValueKind.String }
            || (given.Words is [var word] && word != "[]"
                && !word.StartsWith("[\"", StringComparison.Ordinal));
        if (!isPattern)
        {
            return Names(key, given) is { Count: > 0 } names
                ? new TargetModules(names)
                : throw Wrong(key, given, "a regular expression or a list of names");
        }

        if (given.Plain().Length == 0)
            throw Wrong(key, given, "a regular expression or a list of names");
        try
        {
            return new TargetModules(given.Plain());
        }
        catch (InputException problem)
        {
            throw new InputException($"{key.Name}: {Messages.OneLine(problem.Message)}", problem);
        }
    }

    private static LayerRanges Ranges(TrainKey key, Given given) =>
        LayerRanges.Of(given.Json ?? Parsed(key, given, given.Plain()))
            ?? throw Wrong(key, given, LayerRanges.Form);

    private static TokenIndices Tokens(TrainKey key, Given given)
    {
        string text = given.Json is null ? string.Join(',', given.Words!) : "";
        return TokenIndices.Of(given.Json
                ?? Parsed(key, given, text.StartsWith('[') || text.StartsWith('{') ? text
                    : $"[{text}]"))
            ?? throw Wrong(key, given, TokenIndices.Form);
    }

    private static LoraStart Start(TrainKey key, Given given) =>
        LoraStart.Parse(given.Plain()) ?? throw Wrong(key, given, LoraStart.Choices);

    private static NumbersByName NumbersByName(TrainKey key, Given given)
    {
        var json = given.Json ?? Parsed(key, given, given.Plain());
        if (json.ValueKind != JsonValueKind.Object)
            throw Wrong(key, given, "a JSON object of names and numbers");
        try
        {
            return new NumbersByName([.. json.EnumerateObject().Select(member => (member.Name,
                Number(key with { Name = $"{key.Name} {Messages.Quote(member.Name)}" },
                    new Given(member.Value, null, given.Folder))))]);
        }
        catch (InputException problem) when (!problem.Message.StartsWith(key.Name,
            StringComparison.Ordinal))
        {
            throw new InputException($"{key.Name}: {Messages.OneLine(problem.Message)}", problem);
        }
    }

    private static List<string>? Names(TrainKey key, Given given)
    {
        var names = new List<string>();
        foreach (var item in Items(key, given))
        {
            if (item.ValueKind != JsonValueKind.String
                || item.GetString() is not { Length: > 0 } name)
            {
                if (item.ValueKind == JsonValueKind.String && key.Optional) return null;
                throw Wrong(key, given, "a list of names");
            }

            names.Add(name);
        }

        return names;
    }

    private static List<int> Layers(TrainKey key, Given given)
    {
        var layers = new List<int>();
        foreach (var item in Items(key, given))
        {
            string text = item.ValueKind == JsonValueKind.String && given.Json is null
                ? item.GetString()!
                : item.GetRawText();
            if (!int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int layer))
                throw Wrong(key, given, "a layer number from 0, or a list of them");
            layers.Add(layer);
        }

        return layers;
    }

    // A list is a JSON array (on the command line too), several words, or a single value.
    private static IEnumerable<JsonElement> Items(TrainKey key, Given given)
    {
        var json = given.Json;
        if (given.Words is [var word] && word.StartsWith('[')) json = Parsed(key, given, word);
        if (json is null)
        {
            if (given.Words!.Count == 0) throw Wrong(key, given, "a list");
            return given.Words.Select(text => JsonSerializer.SerializeToElement(text));
        }

        return json is { ValueKind: JsonValueKind.Array } array
            ? array.EnumerateArray() : [json.Value];
    }

    private static ScheduleOptions Options(TrainKey key, Given given)
    {
        var json = given.Json ?? Parsed(key, given, given.Plain());
        if (json.ValueKind == JsonValueKind.Null) return new ScheduleOptions();
        if (json.ValueKind != JsonValueKind.Object) throw Wrong(key, given, "a JSON object");
        var options = new ScheduleOptions();
        foreach (var member in json.EnumerateObject())
        {
            var known = TrainKeys.Schedule.FirstOrDefault(k => k.Name == member.Name)
                ?? throw new InputException(
                    $"{key.Name}: unknown key {Messages.Quote(member.Name)} (did you mean "
                    + $"\"{TrainKeys.Nearest(member.Name, TrainKeys.Schedule.Select(k => k.Name))}\"?)");
            object? value = Convert(known, new Given(member.Value, null, given.Folder));
            known.Property.SetValue(options, value);
        }

        return options;
    }

    private static JsonElement Parsed(TrainKey key, Given given, string text)
    {
        try
        {
            using var document = JsonDocument.Parse(
                text, new JsonDocumentOptions { AllowDuplicateProperties = false });
            return document.RootElement.Clone();
        }
        catch (Exception failure) when (failure is JsonException or ArgumentException)
        {
            throw Wrong(key, given, "JSON");
        }
    }
}
