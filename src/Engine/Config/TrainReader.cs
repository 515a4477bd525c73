using System.Text.Json;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// Reads a configuration: a JSON or YAML file of one flat object, then --name value, --name=value
/// or a bare --name (true) over it, or such arguments alone. Everything wrong in one source is
/// reported at once.
/// </summary>
public sealed class TrainReader
{
    private const int MostProblems = 30;

    private readonly Dictionary<string, Given> _given = [];
    private readonly SortedSet<string> _ignored = [];
    private Given? _deepSpeed;
    private readonly string _workingDirectory;
    private readonly IReadOnlyList<TrainKey>? _keys;

    private TrainReader(string workingDirectory, IReadOnlyList<TrainKey>? keys = null) =>
        (_workingDirectory, _keys) = (workingDirectory, keys);

    /// <summary>
    /// Reads the keys of a command that asks a model (<see cref="TrainKeys.Asking"/>), and no
    /// others, from a command line alone.
    /// </summary>
    /// <exception cref="InputException">Anything unknown, misspelt or out of range.</exception>
    public static TrainArguments ReadAsking(
        IReadOnlyList<string> arguments, string workingDirectory) =>
        ReadAsking(arguments, workingDirectory, out _);

    /// <param name="given">Keys that the arguments set.</param>
    /// <inheritdoc cref="ReadAsking(IReadOnlyList{string}, string)"/>
    public static TrainArguments ReadAsking(IReadOnlyList<string> arguments,
        string workingDirectory, out IReadOnlyCollection<string> given)
    {
        var reader = new TrainReader(Path.GetFullPath(workingDirectory), TrainKeys.Asking);
        reader.TakeArguments(arguments, 0);
        given = reader._given.Keys;
        TrainArguments read = reader.Build();
        return TrainChecks.Unquantised(read) is { } problem
            ? throw new InputException(problem) : read;
    }

    /// <summary>
    /// Reads and checks a configuration. Relative paths of the file start at the file's folder,
    /// those of the arguments at workingDirectory; the record has absolute ones.
    /// </summary>
    /// <param name="arguments">An optional file name, then the arguments of the command
    /// line.</param>
    /// <param name="notice">Takes one line for what was accepted but has no effect.</param>
    /// <exception cref="InputException">Anything unknown, misspelt, out of range or
    /// contradictory.</exception>
    public static TrainArguments Read(
        IReadOnlyList<string> arguments, string workingDirectory, Action<string>? notice = null)
    {
        var reader = new TrainReader(Path.GetFullPath(workingDirectory));
        int first = 0;
        if (arguments.Count > 0 && !arguments[0].StartsWith("--", StringComparison.Ordinal))
        {
            reader.TakeFile(arguments[0]);
            first = 1;
        }

        reader.TakeArguments(arguments, first);
        if (reader._deepSpeed is { } deepSpeed)
            DeepSpeedFile.Read(deepSpeed, reader.Take, line => notice?.Invoke(line));
        var result = reader.Build();
        TrainChecks.Check(result);
        result = result with
        {
            ModelNameOrPath = HubModel.Find(
                result.ModelNameOrPath!, reader._given["model_name_or_path"].Plain(), notice),
        };
        foreach (string line in reader.Notices(result)) notice?.Invoke(line);
        return result;
    }

    private void TakeFile(string name)
    {
        if (name.Length == 0 || name.Any(char.IsControl))
            throw new InputException(
                $"{Messages.Quote(name)} is not the name of a configuration file");
        string path = Path.GetFullPath(name, _workingDirectory);
        var found = new Dictionary<string, Given>();
        var problems = new List<string>();
        string folder = Path.GetDirectoryName(path) ?? path;
        var root = YamlInput.Accepts(path) ? YamlInput.ReadObject(path)
            : JsonInput.ReadObject(path);
        foreach (var (key, value) in root.Members())
            Take(found, key, new Given(value.Element, null, folder), problems);
        Merge(found, problems, Path.GetFileName(path) + ": ");
    }

    private void TakeArguments(IReadOnlyList<string> arguments, int first)
    {
        var found = new Dictionary<string, Given>();
        var problems = new List<string>();
        for (int i = first; i < arguments.Count; i++)
        {
            string argument = arguments[i];
            if (!argument.StartsWith("--", StringComparison.Ordinal) || argument.Length == 2)
            {
                problems.Add(
                    $"unexpected argument {Messages.Quote(argument)}, expected --name value");
                continue;
            }

            int equals = argument.IndexOf('=');
            string name = (equals < 0 ? argument[2..] : argument[2..equals]).Replace('-', '_');
            var words = new List<string>();
            if (equals >= 0) words.Add(argument[(equals + 1)..]);
            else
            {
                while (i + 1 < arguments.Count
                    && !arguments[i + 1].StartsWith("--", StringComparison.Ordinal))
                    words.Add(arguments[++i]);
            }

            // As in argparse the last one counts.
            found.Remove(TrainKeys.Aliases.GetValueOrDefault(name, name));
            Take(found, name, new Given(null, words, _workingDirectory), problems);
        }

        Merge(found, problems, "");
    }

    private void Take(
        Dictionary<string, Given> found, string name, Given given, List<string> problems)
    {
        string key = TrainKeys.Aliases.GetValueOrDefault(name, name);
        if (_keys is null && key == "deepspeed")
        {
            // As given last; none is none.
            _deepSpeed = given.Plain() is "" or "none" or "null" or "false" ? null : given;
        }
        else if (_keys is null && TrainForeignKeys.Ignored.Contains(key))
        {
            _ignored.Add(key);
        }
        else if (_keys is null && TrainForeignKeys.Refused.TryGetValue(key, out var refused))
        {
            string value = given.Plain();
            if (!TrainForeignKeys.IsNeutral(key, value.ToLowerInvariant()))
                problems.Add($"{key} = {Messages.Quote(value)} {refused.Advice}");
        }
        else if ((_keys ?? TrainKeys.Train).FirstOrDefault(k => k.Name == key) is not { } known)
        {
            var names = (_keys ?? TrainKeys.Train).Select(k => k.Name)
                .Concat(_keys is null ? TrainKeys.Aliases.Keys : []);
            problems.Add(_keys is null && OtherToolsKeys.Advice(key) is { } advice
                ? $"{Messages.Quote(name)} {advice}"
                : $"unknown key {Messages.Quote(name)}{TrainKeys.Guess(name, names)}");
        }
        else if (!found.TryAdd(key, given with { Key = known }))
        {
            problems.Add($"{key} is given twice (as {Messages.Quote(name)} too)");
        }
    }

    // A key that follows from another file: false where it is given. As with transformers, numbers
    // that differ are refused.
    private bool Take(string name, JsonElement value, string place)
    {
        TrainKey key = TrainKeys.Train.First(k => k.Name == name);
        var given = new Given(value, null, _workingDirectory) { Key = key };
        object? converted;
        try
        {
            converted = TrainValues.Convert(key, given);
        }
        catch (InputException problem)
        {
            throw new InputException($"{place}: {problem.Message}", problem);
        }

        if (!_given.TryGetValue(name, out Given? own))
        {
            _given.Add(name, given with { Value = converted });
            return true;
        }

        if (converted is bool or double or int && !converted.Equals(own.Value))
            throw new InputException($"{place} is {given.Plain()}, {name} is {own.Plain()}: leave "
                + "one of them out");
        return false;
    }

    // Converts at once so that a bad value is reported with the source it stands in.
    private void Merge(Dictionary<string, Given> found, List<string> problems, string source)
    {
        foreach (var (name, given) in found)
        {
            try
            {
                _given[name] = given with { Value = TrainValues.Convert(given.Key!, given) };
            }
            catch (InputException problem)
            {
                problems.Add(problem.Message);
            }
        }

        if (problems.Count > 0)
            throw new InputException(source + string.Join("; ", problems.Take(MostProblems))
                + (problems.Count > MostProblems
                    ? $"; and {problems.Count - MostProblems} more" : ""));
    }

    private TrainArguments Build()
    {
        var result = new TrainArguments();
        foreach (var given in _given.Values) given.Key!.Property.SetValue(result, given.Value);
        if (!_given.ContainsKey("output_dir"))
            result = result with { OutputDir = Path.Combine(_workingDirectory, result.OutputDir) };
        return result is { UseLora: true, LoraWeightPath: not null }
            ? AdapterSettings.Complete(result, key => _given.TryGetValue(key, out var given)
                && given.Value is not null)
            : result;
    }

    private IEnumerable<string> Notices(TrainArguments arguments)
    {
        if (_ignored.Count > 0)
            yield return "no effect on the result, ignored: " + string.Join(", ", _ignored);
        if (arguments.UseLora && arguments.TuneVision && _given.ContainsKey("tune_vision")
            && !arguments.TrainedWhole.Any(name => name is "vpm" or "vision_tower"))
        {
            yield return "tune_vision trains nothing together with use_lora, "
                + "unless modules_to_save has vpm (as official_compat sets it)";
        }

        if (arguments.UseLora && arguments.TuneAudio && !arguments.TrainedWhole.Contains("apm"))
            yield return "tune_audio trains nothing together with use_lora, "
                + "unless modules_to_save has apm and audio_projection_layer";
    }
}
