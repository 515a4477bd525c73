namespace MiniCpmNative.Engine.Model;

/// <summary>
/// How the pictures of a batch lie in a vision tower: how many rows each takes, its patches and
/// zeros behind them, and which row of the position table each of those reads.
/// </summary>
public abstract record PatchLayout
{
    /// <summary>Rows of a picture of so many patches, at least these.</summary>
    /// <param name="patches">The picture's own.</param>
    /// <param name="longest">Those of the batch's largest picture.</param>
    public abstract int Rows(int patches, int longest);

    /// <summary>Writes the place of each of a picture's rows in the position table.</summary>
    /// <param name="rows">Rows of the picture's grid.</param>
    /// <param name="cols">Columns of the picture's grid.</param>
    /// <param name="side">The table has side^2 rows.</param>
    /// <param name="ids">One for each row that the picture takes.</param>
    public abstract void Positions(int rows, int cols, int side, Span<int> ids);
}

/// <summary>
/// Pictures follow each other without padding, patches are placed by the row and column of their
/// grid. The official code pads and masks, which gives the same numbers.
/// </summary>
public sealed record GridLayout : PatchLayout
{
    public override int Rows(int patches, int longest) => patches;

    public override void Positions(int rows, int cols, int side, Span<int> ids) =>
        PositionBuckets.Write(rows, cols, side, ids);
}
