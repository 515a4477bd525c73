using System.Collections;
using System.Globalization;
using System.Text;
using System.Text.Json;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// Configurations as text: the file beside a run's output, and the list of keys of --help.
/// </summary>
public static class TrainWriter
{
    /// <summary>
    /// The resolved configuration in its output folder; running it again does the same.
    /// </summary>
    public const string FileName = "train_args.json";

    private static readonly JsonWriterOptions Indented = new()
    {
        Indented = true,
        Encoder = System.Text.Encodings.Web.JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    /// <summary>Writes <see cref="FileName"/> into output_dir, which must exist.</summary>
    public static void Save(TrainArguments arguments) => AtomicFile.Write(
        Path.Combine(arguments.OutputDir, FileName), stream => stream.Write(ToJson(arguments)));

    /// <summary>
    /// The configuration that a run left beside its result, or above it where that is a checkpoint;
    /// null where there is none.
    /// </summary>
    /// <exception cref="InputException">It cannot be read.</exception>
    internal static JsonValue? Beside(string result)
    {
        string folder = Path.TrimEndingDirectorySeparator(Path.GetFullPath(result));
        return new[] { folder, Path.GetDirectoryName(folder) ?? folder }
            .Select(where => Path.Combine(where, FileName))
            .FirstOrDefault(File.Exists) is { } file ? JsonInput.ReadObject(file) : null;
    }

    /// <summary>All keys with their values, null where none is set; paths are absolute.</summary>
    public static byte[] ToJson(TrainArguments arguments)
    {
        using var stream = new MemoryStream();
        using (var json = new Utf8JsonWriter(stream, Indented))
            WriteRecord(json, TrainKeys.Train, arguments);
        stream.WriteByte((byte)'\n');
        return stream.ToArray();
    }

    /// <summary>
    /// Every key with its default and meaning, in groups, for a screen of 100 columns.
    /// </summary>
    public static string Help() => Help(TrainKeys.Train);

    /// <summary>The same of the keys of a command that asks a model.</summary>
    public static string HelpOfAsking() => Help(TrainKeys.Asking);

    private static string Help(IReadOnlyList<TrainKey> keys)
    {
        const int column = 36;
        var text = new StringBuilder();
        string group = "";
        var plain = new TrainArguments();
        foreach (var key in keys)
        {
            if (key.Rule.Group != group) text.Append($"\n{group = key.Rule.Group}:\n");
            object? value = key.Property.GetValue(plain);
            bool shown = value is not (null or ScheduleOptions);
            string line = $"  --{key.Name}" + (shown ? " " + Show(value!) : "");
            // Names too long for the column have their meaning on the next line.
            if (line.Length > column - 2)
            {
                text.Append(line).Append('\n');
                line = "";
            }

            text.Append(line.PadRight(column));
            int width = column;
            foreach (string word in key.Rule.Help.Split(' '))
            {
                if (width + word.Length + 1 > 100)
                {
                    text.Append('\n').Append(' ', column);
                    width = column;
                }

                text.Append(width == column ? "" : " ").Append(word);
                width += word.Length + 1;
            }

            text.Append('\n');
        }

        return text.ToString();
    }

    private static void WriteRecord(Utf8JsonWriter json, IReadOnlyList<TrainKey> keys,
        object record)
    {
        json.WriteStartObject();
        foreach (var key in keys)
        {
            json.WritePropertyName(key.Name);
            Write(json, key.Property.GetValue(record));
        }

        json.WriteEndObject();
    }

    private static void Write(Utf8JsonWriter json, object? value)
    {
        switch (value)
        {
            case null: json.WriteNullValue(); break;
            case bool flag: json.WriteBooleanValue(flag); break;
            case int number: json.WriteNumberValue(number); break;
            case long number: json.WriteNumberValue(number); break;
            case double number: json.WriteNumberValue(number); break;
            case Interval interval: json.WriteNumberValue(interval.Value); break;
            case MemoryLimit limit: json.WriteStringValue(limit.Text); break;
            case ResumePoint { Path: null }: json.WriteBooleanValue(true); break;
            case ResumePoint { Path: { } path }: json.WriteStringValue(path); break;
            case DataSources { Paths: [var only] }: json.WriteStringValue(only); break;
            case DataSources several: Write(json, several.Paths); break;
            case TargetModules { Pattern: { } pattern }: json.WriteStringValue(pattern); break;
            case TargetModules targets: Write(json, targets.Suffixes); break;
            case LoraStart start: start.Write(json); break;
            case NumbersByName numbers: numbers.Write(json); break;
            case LayerRanges ranges: ranges.Write(json); break;
            case TokenIndices tokens: tokens.Write(json); break;
            case ScheduleOptions options: WriteRecord(json, TrainKeys.Schedule, options); break;
            case string text: json.WriteStringValue(text); break;
            case IEnumerable list:
                json.WriteStartArray();
                foreach (object? item in list) Write(json, item);
                json.WriteEndArray();
                break;
            default: json.WriteStringValue(TrainKeys.SnakeCase(value.ToString()!)); break;
        }
    }

    /// <summary>The value of a key, as it stands in a configuration.</summary>
    internal static JsonElement Element(TrainKey key, TrainArguments arguments)
    {
        using var stream = new MemoryStream();
        using (var json = new Utf8JsonWriter(stream))
            Write(json, key.Property.GetValue(arguments));
        return JsonElement.Parse(stream.ToArray());
    }

    private static string Show(object value) => value switch
    {
        bool flag => flag ? "true" : "false",
        Interval interval => interval.Value.ToString(CultureInfo.InvariantCulture),
        TargetModules targets => targets.Pattern ?? string.Join(' ', targets.Suffixes),
        LoraStart start => start.Text,
        Enum choice => TrainKeys.SnakeCase(choice.ToString()),
        _ => string.Format(CultureInfo.InvariantCulture, "{0}", value),
    };
}
