using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Data;

/// <summary>The files that sources of rows stand for.</summary>
internal static class DataFiles
{
    private static readonly string[] s_endings = [".json", ".jsonl", ".csv", ".tsv", ".parquet"];

    /// <summary>The files, and how each is read where something says so.</summary>
    /// <exception cref="InputException">A path leads to no file.</exception>
    public static IReadOnlyList<(string Path, RowColumns? Columns)> Of(DataSources sources)
    {
        var files = new List<(string, RowColumns?)>();
        foreach (string path in sources.Paths)
        {
            int entry = path.IndexOf(DatasetInfo.FileName + "#", StringComparison.Ordinal);
            if (entry >= 0)
            {
                int name = entry + DatasetInfo.FileName.Length;
                files.Add(DatasetInfo.Entry(path[..name], path[(name + 1)..]));
            }
            else
            {
                files.AddRange(Expanded(path).Select(file => (file, (RowColumns?)null)));
            }
        }

        return files;
    }

    private static IEnumerable<string> Expanded(string path)
    {
        if (File.Exists(path)) return [path];
        if (File.Exists(Path.Combine(path, "state.json"))
            && Enumerate(path, "*.arrow").Any())
            throw new InputException($"{path}: is a data set saved by Hugging Face's save_to_disk: "
                + "write it with to_parquet or to_json");
        if (Directory.Exists(path))
            return Found(path, Enumerate(path, "*").Where(file =>
                s_endings.Contains(Path.GetExtension(file).ToLowerInvariant())
                && Path.GetFileName(file) != DatasetInfo.FileName),
                "has no file that ends in " + string.Join(", ", s_endings));
        string name = Path.GetFileName(path);
        if (!name.AsSpan().ContainsAny('*', '?')) return Missing(path) is { } why
            ? throw new InputException($"{path}: there is no such file{why}") : [path];
        string folder = Path.GetDirectoryName(path) is { Length: > 0 } given ? given : ".";
        return Found(path, Enumerate(folder, name), "no file has such a name");
    }

    // What other tools would take the name for; null where it is a file's that is not there.
    private static string? Missing(string path)
    {
        int hash = path.LastIndexOf('#');
        if (hash > 0 && path[(hash + 1)..].All(char.IsAsciiDigit) && File.Exists(path[..hash]))
            return ": of ms-swift's #N, N rows of a file, make a smaller file (head -n of a "
                + ".jsonl)";
        if (path.Contains(',') && path.Split(',').All(File.Exists))
            return ": several files stand one behind the other, or as a list, without commas";
        return Path.HasExtension(path) || Directory.Exists(Path.GetDirectoryName(path)) ? null
            : ", nor a folder: of a data set of a hub, download the files and name them";
    }

    private static string[] Found(string path, IEnumerable<string> files, string otherwise)
    {
        string[] found = [.. files.Order(StringComparer.Ordinal)];
        return found.Length > 0 ? found : throw new InputException($"{path}: {otherwise}");
    }

    private static IEnumerable<string> Enumerate(string folder, string pattern)
    {
        try
        {
            return [.. Directory.EnumerateFiles(folder, pattern)
                .Where(file => !Path.GetFileName(file).StartsWith('.'))];
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new InputException(
                $"{folder}: cannot list: {Messages.Reason(failure, folder)}", failure);
        }
    }
}
