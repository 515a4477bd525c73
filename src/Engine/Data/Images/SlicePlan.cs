namespace MiniCpmNative.Engine.Data.Images;

/// <summary>Width and height in pixels.</summary>
public readonly record struct PictureSize(int Width, int Height);

/// <summary>
/// How one picture becomes model input: the size of its overview, and for a sliced picture the grid
/// and the size of each tile. Columns and Rows are 0 when there are no tiles.
/// </summary>
public sealed record SlicePlan(PictureSize Overview, int Columns, int Rows, PictureSize Tile)
{
    /// <summary>
    /// Of each tile: where it is cut out of the picture itself (MiniCPM-OCR); null where it is one
    /// of the others, whose size is Tile. Null where all are.
    /// </summary>
    public IReadOnlyList<PictureCell?>? Cells { get; init; }

    public bool Sliced => Columns > 0;

    /// <summary>Views in model order: the overview, then the tiles row by row.</summary>
    public int Views => 1 + (Columns * Rows);

    /// <summary>The size of a view: 0 is the overview.</summary>
    public PictureSize Size(int view) =>
        view == 0 ? Overview : Cells?[view - 1]?.To ?? Tile;
}

/// <summary>A tile that is cut out of the picture itself, and its size as a view.</summary>
public readonly record struct PictureCell(int Left, int Top, PictureSize From, PictureSize To);
