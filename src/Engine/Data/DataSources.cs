using MiniCpmNative.Engine.Data.Formats;

namespace MiniCpmNative.Engine.Data;

/// <summary>A share of the rows by a shuffle of them all.</summary>
/// <param name="Kept">How many are kept for evaluation: below 1 a share of all, rounded up.</param>
/// <param name="Seed">Of the shuffle.</param>
/// <param name="Evaluates">Whether these are the ones kept, or the others.</param>
public sealed record RowShare(double Kept, long Seed, bool Evaluates);

/// <summary>
/// Where rows come from: files, folders, patterns with * and ?, and entries of LLaMA-Factory's
/// dataset_info.json (dataset_info.json#NAME), in the order given.
/// </summary>
/// <param name="Text">The paths, a line each.</param>
public sealed record DataSources(string Text)
{
    private static readonly string[] s_endings = [".json", ".jsonl", ".csv", ".tsv", ".parquet"];

    public DataSources(IEnumerable<string> paths)
        : this(string.Join('\n', paths))
    {
    }

    /// <summary>Which of the rows; null for all.</summary>
    public RowShare? Share { get; init; }

    public IReadOnlyList<string> Paths => Text.Split('\n');

    /// <summary>The path of a single file.</summary>
    public static implicit operator DataSources(string path) => new(path);

    public static implicit operator string(DataSources sources) => sources.ToString();

    public override string ToString() => Text.Replace("\n", ", ");

    /// <summary>The files, and how each is read where something says so.</summary>
    /// <exception cref="InputException">A path leads to no file.</exception>
    internal IReadOnlyList<(string Path, RowColumns? Columns)> Files()
    {
        var files = new List<(string, RowColumns?)>();
        foreach (string path in Paths)
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
        if (Directory.Exists(path))
            return Found(path, Enumerate(path, "*").Where(file =>
                s_endings.Contains(Path.GetExtension(file).ToLowerInvariant())
                && Path.GetFileName(file) != DatasetInfo.FileName),
                "has no file that ends in " + string.Join(", ", s_endings));
        string name = Path.GetFileName(path);
        if (!name.AsSpan().ContainsAny('*', '?')) return [path];
        string folder = Path.GetDirectoryName(path) is { Length: > 0 } given ? given : ".";
        return Found(path, Enumerate(folder, name), "no file has such a name");
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
