namespace MiniCpmNative.Engine.Data.Images;

/// <summary>Width and height in pixels.</summary>
public readonly record struct PictureSize(int Width, int Height);

/// <summary>
/// How one picture becomes model input: the size of its overview, and for a sliced picture the grid
/// and the size of each tile. Columns and Rows are 0 when there are no tiles.
/// </summary>
public sealed record SlicePlan(PictureSize Overview, int Columns, int Rows, PictureSize Tile)
{
    public bool Sliced => Columns > 0;

    /// <summary>Views in model order: the overview, then the tiles row by row.</summary>
    public int Views => 1 + (Columns * Rows);
}
