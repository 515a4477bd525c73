using MiniCpmNative.Engine;

namespace MiniCpmNative.Cli;

/// <summary>
/// Takes the options that are a command's own, --name VALUE, --name=VALUE or a bare --flag, out of
/// its arguments; the rest is a configuration's.
/// </summary>
internal sealed class OwnOptions
{
    private readonly List<(string Name, string Value)> _given = [];

    /// <param name="args">The arguments.</param>
    /// <param name="named">Options with a value.</param>
    /// <param name="flags">Options without.</param>
    /// <exception cref="InputException">A value is missing, or there is one too many.</exception>
    public OwnOptions(IReadOnlyList<string> args, string[] named, string[] flags)
    {
        var rest = new List<string>();
        for (int i = 0; i < args.Count; i++)
        {
            string name = args[i].Split('=', 2)[0];
            bool hasValue = args[i].Length > name.Length;
            if (flags.Contains(name))
            {
                if (hasValue) throw new InputException($"{name} takes no value");
                _given.Add((name, ""));
            }
            else if (named.Contains(name))
            {
                string? value = hasValue ? args[i][(name.Length + 1)..]
                    : i + 1 < args.Count ? args[++i] : null;
                if (string.IsNullOrEmpty(value) || value.Any(char.IsControl))
                    throw new InputException($"{name} has no value");
                _given.Add((name, value));
            }
            else
            {
                rest.Add(args[i]);
            }
        }

        Rest = [.. rest];
    }

    /// <summary>What is not the command's own.</summary>
    public string[] Rest { get; }

    /// <summary>The last value given, or null.</summary>
    public string? Text(string name) => All(name).LastOrDefault();

    public IEnumerable<string> All(string name) =>
        from option in _given where option.Name == name select option.Value;

    public bool Has(string flag) => All(flag).Any();
}
