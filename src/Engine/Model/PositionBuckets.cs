namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Rows of the vision tower's position table for the patches of a picture with any grid: each axis
/// is cut into as many buckets as the table has rows or columns, id = bucket(row) * side +
/// bucket(column). Mathematically bucket(i, n) = floor(side * i / n), but the official code
/// compares float32 values of torch.arange, whose rounding puts exact ties of some n one bucket
/// lower; a model trained with these ids needs the same,
/// so torch's arithmetic is followed step by step.
/// </summary>
public static class PositionBuckets
{
    // torch.arange fills 16 floats at a time: two vectors of 8 that start from a float32 base.
    private const int Block = 16, Lanes = 8;

    /// <summary>
    /// ids[r * cols + c] of a grid of rows x cols patches; side is the table's rows or columns.
    /// </summary>
    public static void Write(int rows, int cols, int side, Span<int> ids)
    {
        Span<int> column = cols <= 256 ? stackalloc int[cols] : new int[cols];
        for (int c = 0; c < cols; c++) column[c] = Bucket(c, cols, side);
        for (int r = 0; r < rows; r++)
        {
            int first = Bucket(r, rows, side) * side;
            for (int c = 0; c < cols; c++) ids[(r * cols) + c] = first + column[c];
        }
    }

    /// <summary>
    /// Number of boundaries j / side, j = 1..side-1, that are at most i / count, in float32.
    /// </summary>
    public static int Bucket(int i, int count, int side) =>
        Bucket(Arange(i, count, 0, 1f / count), i, count, side);

    /// <summary>The same where the place is a quotient of float32, as newer classes have
    /// it.</summary>
    public static int QuotientBucket(int i, int count, int side) =>
        Bucket((float)i / count, i, count, side);

    private static int Bucket(float place, int i, int count, int side)
    {
        double step = 1.0 / side;
        // The answer is within one of the exact quotient.
        int bucket = Math.Max(0, (int)((long)side * i / count) - 1);
        while (bucket < side - 1 && Arange(bucket, side - 1, step, step) <= place) bucket++;
        return bucket;
    }

    /// <summary>Element i of count elements of torch.arange(start, end, step) in float32.</summary>
    private static float Arange(int i, int count, double start, double step)
    {
        if (i >= count / Block * Block) return (float)(start + (step * i));
        int lane = i % Lanes;
        float first = (float)(start + (step * (i - lane)));
        return (float)(first + (lane * step));
    }
}
