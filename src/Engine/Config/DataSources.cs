namespace MiniCpmNative.Engine.Config;

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
}
