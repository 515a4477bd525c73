using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Cli;

/// <summary>
/// The arguments of a command that has few: plain ones in order, --name value or --name=value, and
/// switches, which have no value.
/// </summary>
internal sealed class Options
{
    private readonly string _command;
    private readonly Dictionary<string, string?> _given = [];

    /// <param name="command">What errors begin with.</param>
    /// <param name="args">The arguments behind the command.</param>
    /// <param name="names">Options with a value, without dashes.</param>
    /// <param name="switches">Options without one.</param>
    /// <exception cref="InputException">Unknown, given twice, or without its value.</exception>
    public Options(string command, string[] args, string[] names, string[] switches)
    {
        _command = command;
        for (int i = 0; i < args.Length; i++)
        {
            if (!args[i].StartsWith("--", StringComparison.Ordinal))
            {
                Plain.Add(args[i]);
                continue;
            }

            string[] parts = args[i][2..].Split('=', 2);
            string name = parts[0];
            bool isSwitch = switches.Contains(name);
            if (!isSwitch && !names.Contains(name))
                throw new InputException($"{command}: unknown option {Messages.Quote(args[i])}"
                    + $" (did you mean \"--{TrainKeys.Nearest(name, [.. names, .. switches])}\"?)");
            if (isSwitch && parts.Length > 1)
                throw new InputException($"{command}: --{name} takes no value");
            string? value = isSwitch ? null
                : parts.Length > 1 ? parts[1] : i + 1 < args.Length ? args[++i] : "";
            if (value?.Length == 0 || value?.Any(char.IsControl) == true)
                throw new InputException($"{command}: --{name} has no value");
            if (!_given.TryAdd(name, value))
                throw new InputException($"{command}: --{name} is given twice");
        }
    }

    /// <summary>What stands without a name.</summary>
    public List<string> Plain { get; } = [];

    public bool Has(string name) => _given.ContainsKey(name);

    public string? Find(string name) => _given.GetValueOrDefault(name);

    /// <exception cref="InputException">It is not given.</exception>
    public string Require(string name, string what) => Find(name)
        ?? throw new InputException($"{_command}: --{name} is missing: {what}");

    /// <summary>The one plain argument.</summary>
    /// <exception cref="InputException">There is none, or another number.</exception>
    public string Only(string what) => Plain.Count == 1 ? Plain[0] : throw new InputException(
        $"{_command}: expected one argument, {what}, got {Plain.Count}");
}
