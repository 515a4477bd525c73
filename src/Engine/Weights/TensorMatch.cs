using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Weights;

/// <summary>A tensor that a model expects in its files: official name and shape.</summary>
public record ExpectedTensor(string Name, Shape Shape)
{
    /// <summary>Whether it may hold other numbers than floats, which the caller checks.</summary>
    public bool IsAnyType { get; init; }
}

/// <summary>
/// Compares the tensors of files with those a model expects. All differences of one load are
/// reported in one error, so that a wrong checkpoint is recognised at once;
/// nothing is ever left out in silence.
/// </summary>
public static class TensorMatch
{
    /// <summary>The stored tensor of each expected one, in the order of the expectation.</summary>
    /// <param name="place">The file or directory the error begins with.</param>
    /// <param name="explain">Says what an unmatched tensor is, or null when nothing is
    /// known.</param>
    /// <exception cref="InputException">
    /// Missing, unmatched, misshaped or non-float tensors.
    /// </exception>
    public static IReadOnlyList<StoredTensor> Require(
        string place,
        IReadOnlyCollection<StoredTensor> stored,
        IReadOnlyCollection<ExpectedTensor> expected,
        Func<string, string?>? explain = null) => Require(
            place, stored.ToDictionary(tensor => tensor.Name, StringComparer.Ordinal), expected,
            explain);

    /// <param name="stored">By the names that are expected.</param>
    /// <inheritdoc cref="Require(string, IReadOnlyCollection{StoredTensor}, IReadOnlyCollection{ExpectedTensor}, Func{string, string?}?)"/>
    public static IReadOnlyList<StoredTensor> Require(
        string place,
        IReadOnlyDictionary<string, StoredTensor> stored,
        IReadOnlyCollection<ExpectedTensor> expected,
        Func<string, string?>? explain = null)
    {
        var byName = new Dictionary<string, StoredTensor>(stored, StringComparer.Ordinal);
        var matched = new List<StoredTensor>(expected.Count);
        List<string> missing = [], misshaped = [], mistyped = [];
        foreach (var tensor in expected)
        {
            if (!byName.Remove(tensor.Name, out var found))
            {
                missing.Add(tensor.Name);
                continue;
            }

            matched.Add(found);
            if (!SameShape(found, tensor.Shape))
                misshaped.Add($"{tensor.Name} {found.SizesText} (expected {tensor.Shape})");
            if (!tensor.IsAnyType
                && (found.StoredType.Kernel is not { } type || !type.IsFloat()))
                mistyped.Add($"{tensor.Name} {found.StoredType.Name}");
        }

        List<string> unmatched = [.. byName.Keys.Order(StringComparer.Ordinal)
            .Select(name => Explained(name, explain))];
        List<string> problems = [.. new[]
        {
            Listed("missing", missing), Listed("unmatched", unmatched),
            Listed("misshaped", misshaped),
            Listed("not of type F32, BF16, F16 or F64", mistyped),
        }.Where(problem => problem.Length > 0)];
        if (problems.Count == 0) return matched;
        throw new InputException($"{place}: the tensors do not fit: {string.Join("; ", problems)}");
    }

    private static bool SameShape(StoredTensor stored, Shape shape)
    {
        if (stored.Sizes.Length != shape.Rank) return false;
        for (int axis = 0; axis < shape.Rank; axis++)
            if (stored.Sizes[axis] != shape[axis]) return false;
        return true;
    }

    private static string Explained(string name, Func<string, string?>? explain)
    {
        string shown = Messages.OneLine(name);
        return explain?.Invoke(name) is { } reason ? $"{shown} ({reason})" : shown;
    }

    private static string Listed(string what, List<string> names) =>
        names.Count == 0 ? "" : $"{names.Count} {what}: {Messages.List(names)}";
}
