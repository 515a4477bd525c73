using System.Reflection;
using System.Text.Json;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// Help text and range of one configuration key; numbers are at least 0 unless it says else.
/// </summary>
[AttributeUsage(AttributeTargets.Property)]
public sealed class KeyAttribute(string group, string help) : Attribute
{
    public string Group => group;

    public string Help => help;

    public double Min { get; init; }

    public double Max { get; init; } = int.MaxValue;

    /// <summary>Upper bound that is itself excluded.</summary>
    public double Below { get; init; } = double.PositiveInfinity;

    /// <summary>The minimum is itself excluded.</summary>
    public bool Open { get; init; }

    /// <summary>The key, where it is not the property's name.</summary>
    public string? Name { get; init; }

    /// <summary>The value is a path, relative to where it was given.</summary>
    public bool Path { get; init; }

    /// <summary>
    /// What is trained does not depend on it, bit for bit, or what does is known by other means.
    /// </summary>
    public bool SameBits { get; init; }

    /// <summary>Whether a run that goes on with another value would not go on bit for
    /// bit.</summary>
    public bool Binds =>
        !SameBits && (Group is "Model" or "Data" or "Trained parts" or "Optimisation");

    public bool Allows(double value) =>
        value <= Max && value < Below && (Open ? value > Min : value >= Min);

    /// <summary>
    /// The range in words; an upper bound that hardly anyone meets only when value does.
    /// </summary>
    public string Range(double value)
    {
        string from = Open ? $"above {Min}" : $"at least {Min}";
        if (!double.IsPositiveInfinity(Below)) return $"{from} and below {Below}";
        return Max >= int.MaxValue && value <= Max ? from : $"{from} and at most {Max}";
    }
}

/// <summary>
/// One key of a configuration record: its name in files and on the command line, its rule.
/// </summary>
internal sealed record TrainKey(string Name, PropertyInfo Property, KeyAttribute Rule)
{
    public Type Type { get; } =
        Nullable.GetUnderlyingType(Property.PropertyType) ?? Property.PropertyType;

    /// <summary>null may be given and means the same as not giving the key.</summary>
    public bool Optional { get; } =
        new NullabilityInfoContext().Create(Property).WriteState == NullabilityState.Nullable;

    public bool IsList => Type == typeof(TargetModules) || Type == typeof(DataSources)
        || Type == typeof(TokenIndices) || Type == typeof(ReportTo)
        || Type == typeof(IReadOnlyList<string>) || Type == typeof(IReadOnlyList<int>);
}

/// <summary>
/// The keys of a configuration record, in the order in which the record declares them.
/// </summary>
internal static partial class TrainKeys
{
    public static IReadOnlyList<TrainKey> Train { get; } = Of(typeof(TrainArguments));

    /// <summary>What counts where a model is asked and nothing is trained.</summary>
    public static IReadOnlyList<TrainKey> Asking { get; } = [.. Train.Where(key =>
        key.Rule.Group == "Generation" || key.Name is "max_slice_nums" or "bf16" or "fp16"
            or "device" or "threads" or "seed" or "q_lora" or "load_in_4bit"
            or "bnb_4bit_quant_type" or "bnb_4bit_use_double_quant" or "llm_int8_skip_modules"
            or "init_audio" || key.Name.StartsWith("video_", StringComparison.Ordinal))];

    public static IReadOnlyList<TrainKey> Schedule { get; } = Of(typeof(ScheduleOptions));

    /// <summary>Other spellings of keys.</summary>
    public static IReadOnlyDictionary<string, string> Aliases { get; } =
        new Dictionary<string, string>
        {
            ["evaluation_strategy"] = "eval_strategy",
            ["lora_modules_to_save"] = "modules_to_save",
            ["train_data_path"] = "data_path",
        };

    public static string SnakeCase(string name) =>
        Bits().Replace(JsonNamingPolicy.SnakeCaseLower.ConvertName(name), "_");

    // Before the number of "8bit", which begins a word.
    [GeneratedRegex("(?<=[a-z])(?=[0-9]+bit)")]
    private static partial Regex Bits();

    /// <summary>The known name with the smallest edit distance.</summary>
    public static string Nearest(string name, IEnumerable<string> known)
    {
        string best = "";
        int least = int.MaxValue;
        string cut = name.Length > 100 ? name[..100] : name;
        foreach (string candidate in known)
        {
            int distance = Distance(cut, candidate);
            if (distance >= least) continue;
            (best, least) = (candidate, distance);
        }

        return best;
    }

    /// <summary>" (did you mean ...?)", or nothing where no name is near.</summary>
    public static string Guess(string name, IEnumerable<string> known)
    {
        string best = Nearest(name, known);
        // A third of the letters may be others, as in a slip; beyond that it is another word.
        return best.Length > 0 && Distance(name.Length > 100 ? name[..100] : name, best)
            <= Math.Max(2, Math.Min(name.Length, best.Length) / 3)
            ? $" (did you mean \"{best}\"?)" : "";
    }

    /// <summary>
    /// Damerau-Levenshtein distance (adjacent transpositions count once, no part edited twice).
    /// </summary>
    internal static int Distance(string a, string b)
    {
        var cost = new int[a.Length + 1, b.Length + 1];
        for (int i = 0; i <= a.Length; i++) cost[i, 0] = i;
        for (int j = 0; j <= b.Length; j++) cost[0, j] = j;
        for (int i = 1; i <= a.Length; i++)
        {
            for (int j = 1; j <= b.Length; j++)
            {
                int change = cost[i - 1, j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
                int best = Math.Min(change, Math.Min(cost[i - 1, j], cost[i, j - 1]) + 1);
                if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                    best = Math.Min(best, cost[i - 2, j - 2] + 1);
                cost[i, j] = best;
            }
        }

        return cost[a.Length, b.Length];
    }

    private static List<TrainKey> Of(Type record)
    {
        var keys = new List<TrainKey>();
        foreach (var property in record.GetProperties())
            if (property.GetCustomAttribute<KeyAttribute>() is { } rule)
                keys.Add(new TrainKey(rule.Name ?? SnakeCase(property.Name), property, rule));
        return keys;
    }
}
