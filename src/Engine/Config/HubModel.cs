using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// A model named as on the Hugging Face hub (owner/name): found in the hub's cache folder where it
/// has been downloaded to, as HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME say. Nothing is downloaded.
/// </summary>
internal static partial class HubModel
{
    /// <param name="path">What the name is as a path.</param>
    /// <param name="given">The name as it was given.</param>
    /// <param name="notice">Takes a line on where it was found.</param>
    /// <exception cref="InputException">It is a hub name, and not in the cache.</exception>
    public static string Find(string path, string given, Action<string>? notice)
    {
        if (Directory.Exists(path) || File.Exists(path) || !HubName().IsMatch(given)) return path;
        // A folder that is there makes it a path that was mistyped.
        if (Directory.Exists(Path.GetDirectoryName(path))) return path;
        string model = Path.Combine(Cache(), "models--" + given.Replace("/", "--"));
        if (Snapshot(model) is not { } folder)
            throw new InputException($"model_name_or_path {Messages.Quote(given)} is no folder, "
                + $"and as a name of the Hugging Face hub not in its cache {Cache()}: download it "
                + $"(hf download {given} --local-dir FOLDER) and name the folder");
        notice?.Invoke($"model_name_or_path {given}: found in the Hugging Face cache, {folder}");
        return folder;
    }

    private static string Cache()
    {
        if (Variable("HF_HUB_CACHE") is { } cache) return cache;
        string home = Variable("HF_HOME") ?? Path.Combine(Variable("XDG_CACHE_HOME")
            ?? Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile),
                ".cache"),
            "huggingface");
        return Path.Combine(home, "hub");

        static string? Variable(string name) =>
            Environment.GetEnvironmentVariable(name) is { Length: > 0 } value ? value : null;
    }

    // What "main" leads to, else the newest one.
    private static string? Snapshot(string model)
    {
        string snapshots = Path.Combine(model, "snapshots"),
            main = Path.Combine(model, "refs", "main");
        try
        {
            if (File.Exists(main)
                && Path.Combine(snapshots, File.ReadAllText(main).Trim()) is var named
                && File.Exists(Path.Combine(named, "config.json"))) return named;
            return !Directory.Exists(snapshots) ? null : Directory.EnumerateDirectories(snapshots)
                .Where(folder => File.Exists(Path.Combine(folder, "config.json")))
                .OrderByDescending(Directory.GetLastWriteTimeUtc).FirstOrDefault();
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException
            or ArgumentException)
        {
            return null;
        }
    }

    [GeneratedRegex(@"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    private static partial Regex HubName();
}
