using System.Diagnostics;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// The programs of bench/peers, run by a Python that has torch, transformers and peft. Their output
/// is shown; lines "PEER name: 123 tok/s ..." are taken for the ratios.
/// </summary>
internal sealed partial class Peers(RealOptions options, Func<string, bool> hasTime)
{
    public IReadOnlyDictionary<string, double> Run()
    {
        var found = new Dictionary<string, double>();
        if (options.Peer is not { } python) return found;
        Console.WriteLine();
        if (!Run(python, ["-c", "import torch, transformers, peft"], found))
        {
            Console.WriteLine($"--peer {python}: cannot import torch, transformers and peft");
            return found;
        }

        if (options.Peers.Contains("attention") && hasTime("attention"))
            Run(python, [Script("attention.py")], found);
        ModelSizes small = options.IsTiny ? options.Sizes : ModelSizes.Small;
        foreach (string variant in options.Peers.Where(p => p != "attention"))
        {
            string[] cases = [.. options.Cases.Where(c => c.Peers.Contains($"{variant} {c.Name}"))
                .Select(c => c.Name)];
            foreach (bool isSmall in (bool[])[false, true])
            {
                string[] these = [.. cases.Where(c => (c == "small") == isSmall)];
                if (these.Length == 0 || !hasTime($"{variant} {string.Join(' ', these)}")) continue;
                ModelSizes sizes = isSmall ? small : options.Sizes;
                Run(python,
                    [
                        Script("hf_peft.py"), variant, string.Join(',', these), $"{options.Steps}",
                        $"{sizes.Hidden},{sizes.Layers},{sizes.Inter},{sizes.Heads},{sizes.Kv},{sizes.Vocab}",
                        $"{options.Cases[0].Tokens}",
                    ],
                    found);
            }
        }

        return found;
    }

    internal static string Script(string name) =>
        Path.Combine(AppContext.BaseDirectory, "peers", name);

    // Whether it ended well.
    internal static bool Run(string python, string[] arguments, Dictionary<string, double> found)
    {
        try
        {
            using Process process = Process.Start(
                new ProcessStartInfo(python, arguments) { RedirectStandardOutput = true })!;
            while (process.StandardOutput.ReadLine() is { } line)
            {
                Console.WriteLine(line);
                if (Result().Match(line) is { Success: true } match)
                    found[match.Groups[1].Value] = double.Parse(match.Groups[2].Value);
            }

            process.WaitForExit();
            return process.ExitCode == 0;
        }
        catch (System.ComponentModel.Win32Exception failure)
        {
            Console.WriteLine($"--peer {python} cannot be started: {failure.Message}");
            return false;
        }
    }

    [GeneratedRegex(@"^PEER (.+): ([0-9.]+) tok/s")]
    private static partial Regex Result();
}
