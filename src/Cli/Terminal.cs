using System.Globalization;

namespace MiniCpmNative.Cli;

/// <summary>What the screen can do.</summary>
internal static class Terminal
{
    private const int UsualColumns = 80;

    /// <summary>Output goes to a terminal on which a line can be rewritten.</summary>
    public static bool IsThere =>
        !Console.IsOutputRedirected && Environment.GetEnvironmentVariable("TERM") != "dumb";

    /// <summary>Columns of the terminal now; it may be resized at any time.</summary>
    public static int Columns()
    {
        try
        {
            if (Console.WindowWidth is > 0 and int columns) return columns;
        }
        catch (IOException)
        {
            // No window to ask: the environment may know.
        }

        return int.TryParse(
            Environment.GetEnvironmentVariable("COLUMNS"), CultureInfo.InvariantCulture,
            out int told)
            && told > 0 ? told : UsualColumns;
    }
}
