namespace MiniCpmNative.Engine.Data;

/// <summary>What one row is like: why it is bad, or its length and pictures.</summary>
/// <param name="Bad">The reason, or null for a usable row.</param>
/// <param name="Tokens">Tokens before a cut to model_max_length.</param>
/// <param name="Supervised">Tokens that carry a label, after the cut.</param>
/// <param name="Cut">Whether it is longer than model_max_length.</param>
/// <param name="AnswersCut">Answers that lose their end, or all of it, in the cut.</param>
/// <param name="Pictures">Pictures it names.</param>
/// <param name="Turned">Those of them with an EXIF orientation.</param>
/// <param name="Pixels">Pixels of all of them.</param>
/// <param name="Kinds">The kind of each of them, in words; null for a bad row.</param>
public readonly record struct RowCheck(
    BadRow? Bad, int Tokens, int Supervised, bool Cut, int AnswersCut, int Pictures, int Turned,
    long Pixels, IReadOnlyList<string>? Kinds)
{
    /// <summary>Sounds it names.</summary>
    public int Sounds { get; init; }

    /// <summary>What it brings to the device; nothing for a bad row.</summary>
    public RowSize Size { get; init; }
}

/// <summary>What a row, or several together, bring to the device; a sound counts as a view of as
/// many patches as it has frames.</summary>
public readonly record struct RowSize(int Tokens, int Labels, int Views, int Patches)
{
    public static RowSize operator +(RowSize a, RowSize b) => new(
        a.Tokens + b.Tokens, a.Labels + b.Labels, a.Views + b.Views, a.Patches + b.Patches);

    /// <summary>The larger of each.</summary>
    public RowSize Max(RowSize other) => new(
        Math.Max(Tokens, other.Tokens), Math.Max(Labels, other.Labels),
        Math.Max(Views, other.Views), Math.Max(Patches, other.Patches));

    /// <summary>Whether nothing of it is less than the other's.</summary>
    public bool Covers(RowSize other) => Tokens >= other.Tokens && Labels >= other.Labels
        && Views >= other.Views && Patches >= other.Patches;
}

/// <summary>What the usable rows of a file are like together; see <see cref="RowCheck"/>.</summary>
/// <param name="Rows">Rows that are used.</param>
/// <param name="LeftOut">Rows that are bad.</param>
/// <param name="Orients">Whether EXIF orientations are applied.</param>
/// <param name="MaxLength">model_max_length.</param>
public sealed record RowCounts(
    int Rows, int LeftOut, int Cut, int AnswersCut, int Pictures, int Turned, bool Orients,
    int MaxLength)
{
    /// <param name="checks">Of the rows that could be read.</param>
    /// <param name="unreadable">How many could not.</param>
    public static RowCounts Of(
        IReadOnlyList<RowCheck> checks, int unreadable, bool orients, int maxLength)
    {
        int bad = checks.Count(c => c.Bad is not null);
        var good = checks.Where(c => c.Bad is null);
        return new RowCounts(
            checks.Count - bad, unreadable + bad, good.Count(c => c.Cut),
            good.Sum(c => c.AnswersCut), good.Sum(c => c.Pictures), good.Sum(c => c.Turned),
            orients, maxLength);
    }

    /// <summary>What becomes of an EXIF orientation, in words.</summary>
    public string TurnedText => "with an EXIF orientation, which is " + (Orients
        ? "applied" : "not applied (apply_exif_orientation=true does)");

    /// <summary>Whatever is not as it was written, in one line; empty if all is.</summary>
    public override string ToString() => string.Join("; ", new[]
    {
        LeftOut > 0 ? $"{Messages.Number(LeftOut)} bad rows are left out" : "",
        Cut > 0
            ? $"{Messages.Number(Cut)} of {Messages.Number(Rows)} rows are longer than "
                + $"model_max_length {Messages.Number(MaxLength)} and cut, "
                + $"{Messages.Number(AnswersCut)} answers lose their end"
            : "",
        Turned > 0
            ? $"{Messages.Number(Turned)} of {Messages.Number(Pictures)} pictures {TurnedText}"
            : "",
    }.Where(part => part.Length > 0));
}
