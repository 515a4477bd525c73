using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// The matrices of many experts that files hold one by one, as transformers writes a new model: to
/// readers the two tensors that its class has, experts.gate_up_proj (of each expert gate, then up)
/// and experts.down_proj. Files with those two need none of this. What is saved has the form that
/// was read (<see cref="StoredTensor.Pieces"/>).
/// </summary>
public sealed unsafe partial class JoinedTensor : StoredTensor
{
    private readonly StoredTensor[] _pieces;

    // One after the other, all of one size.
    private JoinedTensor(string name, StoredTensor[] pieces, int experts)
        : base(pieces[0].File, name, pieces[0].StoredType,
            [experts, pieces.Length / experts * pieces[0].Sizes[0], pieces[0].Sizes[1]], 0,
            pieces.Length * pieces[0].Bytes) => _pieces = pieces;

    public override IReadOnlyList<StoredTensor> Pieces => _pieces;

    /// <summary>Puts joined tensors in the place of experts' own.</summary>
    /// <exception cref="InputException">Experts are missing, or of several shapes or
    /// types.</exception>
    public static void Fold(string directory, Dictionary<string, StoredTensor> tensors)
    {
        var experts = new Dictionary<string, Dictionary<(int Expert, string Part), StoredTensor>>(
            StringComparer.Ordinal);
        StoredTensor[] all = [.. tensors.Values];
        foreach (StoredTensor tensor in all)
            if (Own().Match(tensor.Name) is { Success: true } match)
            {
                string of = match.Groups[1].Value;
                if (!experts.TryGetValue(of, out var parts)) experts.Add(of, parts = []);
                parts.Add((int.Parse(match.Groups[2].ValueSpan), match.Groups[3].Value), tensor);
            }

        if (experts.Count == 0) return;
        tensors.Clear();
        foreach (StoredTensor tensor in all)
        {
            Match match = Own().Match(tensor.Name);
            if (!match.Success)
            {
                Add(tensor);
                continue;
            }

            string of = match.Groups[1].Value;
            if (!experts.Remove(of, out var parts)) continue;
            int count = 1 + parts.Keys.Max(key => key.Expert);
            Add(Join(directory, of, parts, count, "gate_up_proj", "gate_proj", "up_proj"));
            Add(Join(directory, of, parts, count, "down_proj", "down_proj"));
        }

        void Add(StoredTensor tensor)
        {
            if (!tensors.TryAdd(tensor.Name, tensor))
                throw new InputException($"{directory}: {Messages.Quote(tensor.Name)} is there in "
                    + "two forms, joined and one by one");
        }
    }

    internal override StoredTensor As(string name)
    {
        int before = Name.LastIndexOf('.'), now = name.LastIndexOf('.');
        return new JoinedTensor(name, Array.ConvertAll(_pieces,
            piece => piece.As(name[..now] + piece.Name[before..])), (int)Sizes[0]);
    }

    public override void Read(long from, Span<byte> target)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(from);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(target.Length, Bytes - from);
        long each = _pieces[0].Bytes;
        while (target.Length > 0)
        {
            int count = (int)Math.Min(target.Length, each - (from % each));
            _pieces[from / each].Read(from % each, target[..count]);
            from += count;
            target = target[count..];
        }
    }

    internal override void Fill(void* target)
    {
        foreach (StoredTensor piece in _pieces)
        {
            piece.Fill(target);
            target = (byte*)target + piece.Bytes;
        }
    }

    private static JoinedTensor Join(string directory, string of,
        Dictionary<(int, string), StoredTensor> parts, int experts, string name,
        params string[] order)
    {
        // The largest number says how many there are, and may be a mistake.
        StoredTensor? first = parts.GetValueOrDefault((0, order[0]));
        var pieces = new List<StoredTensor>();
        for (int e = 0; e < experts; e++)
            foreach (string part in order)
            {
                string full = $"{of}.{e}.{part}.weight";
                StoredTensor piece = parts.GetValueOrDefault((e, part)) ?? throw new InputException(
                    $"{directory}: there is no tensor {Messages.Quote(full)}, "
                    + $"but one of expert {experts - 1}");
                if (piece.Sizes.Length != 2 || !piece.Sizes.SequenceEqual(first!.Sizes)
                    || piece.StoredType != first.StoredType)
                    throw new InputException($"{piece.Place} is {piece.StoredType.Name} "
                        + $"{piece.SizesText}, expected a matrix like {first!.Name}, "
                        + $"{first.StoredType.Name} {first.SizesText}");
                pieces.Add(piece);
            }

        return new JoinedTensor($"{of}.{name}", [.. pieces], experts);
    }

    [GeneratedRegex(@"^(.*\.experts)\.(0|[1-9]\d{0,5})\.(gate_proj|up_proj|down_proj)\.weight\z")]
    private static partial Regex Own();
}
