using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>Ids of the tokens that give a sequence its structure.</summary>
internal sealed class ModelTokens
{
    public int TurnStart { get; }
    public int TurnEnd { get; }
    public int ImageStart { get; }
    public int ImageEnd { get; }
    public int SliceStart { get; }
    public int SliceEnd { get; }

    /// <summary>
    /// The word "assistant", by which the official script finds answers; -1 if several tokens.
    /// </summary>
    public int Assistant { get; }

    /// <summary>
    /// What the last token of an answer's turn is to predict, besides being predicted.
    /// </summary>
    public int EndOfAnswer { get; }

    /// <summary>The token that holds a feature row's place.</summary>
    public string Unknown { get; }

    /// <summary>Tokens that a text must not contain: they would be taken for structure.</summary>
    public string[] Structural { get; }

    /// <exception cref="InputException">The tokenizer lacks one of them.</exception>
    public ModelTokens(Tokenizer tokenizer, bool useImageId, string place)
    {
        Unknown = tokenizer.UnknownToken ?? "<unk>";
        TurnStart = Id(ChatFormat.TurnStart);
        TurnEnd = Id(ChatFormat.TurnEnd);
        ImageStart = Id(Placeholder.ImageStart);
        ImageEnd = Id(Placeholder.ImageEnd);
        SliceStart = Id(Placeholder.SliceStart);
        SliceEnd = Id(Placeholder.SliceEnd);
        Id(Unknown);
        if (useImageId)
        {
            Id(Placeholder.IdStart);
            Id(Placeholder.IdEnd);
        }
        Assistant = tokenizer.IdOf("assistant") ?? -1;
        EndOfAnswer = tokenizer.EosId
            ?? throw new InputException($"{place}: the tokenizer has no eos_token");
        Structural =
        [
            ChatFormat.TurnStart, ChatFormat.TurnEnd, Placeholder.ImageStart, Placeholder.ImageEnd,
            Placeholder.SliceStart, Placeholder.SliceEnd, Placeholder.IdStart, Placeholder.IdEnd,
            Unknown,
        ];
        foreach (var same in Structural.GroupBy(tokenizer.IdOfAdded).Where(g => g.Key is not null))
            if (same.Count() > 1)
                throw new InputException($"{place}: the tokenizer has one token for "
                    + $"{string.Join(" and ", same.Select(Messages.Quote))} (unk_token holds the "
                    + "places of picture features); MiniCPM-V needs different ones");

        int Id(string token) => tokenizer.IdOfAdded(token)
            ?? throw new InputException($"{place}: the tokenizer has no special token "
                + $"{Messages.Quote(token)}, which MiniCPM-V uses");
    }

    /// <summary>The views in ids; null when starts and ends do not pair up.</summary>
    public ImageBound[]? Bounds(ReadOnlySpan<int> ids)
    {
        var starts = new List<int>();
        var ends = new List<int>();
        for (int i = 0; i < ids.Length; i++)
            if (ids[i] == ImageStart || ids[i] == SliceStart) starts.Add(i + 1);
            else if (ids[i] == ImageEnd || ids[i] == SliceEnd) ends.Add(i);
        return starts.Count != ends.Count ? null
            : [.. starts.Zip(ends, (start, end) => new ImageBound(start, end))];
    }

    /// <summary>
    /// Shifted labels of ids: where answer[i] holds, position i-1 predicts ids[i]; behind an
    /// answer's last token that token predicts the end once more, as the official script has it.
    /// </summary>
    public int[] Labels(ReadOnlySpan<int> ids, ReadOnlySpan<bool> answer)
    {
        var labels = new int[ids.Length];
        labels.AsSpan().Fill(Sample.Ignored);
        for (int i = 1; i < ids.Length; i++)
            if (answer[i]) labels[i - 1] = ids[i];
            else if (answer[i - 1]) labels[i - 1] = EndOfAnswer;
        return labels;
    }
}
