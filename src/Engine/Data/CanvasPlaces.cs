using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Where a token stands (V-4_7): in the text, and on the canvas of its picture, which has the
/// text's place outside of pictures. Rotary frequencies are shared out among the three.
/// </summary>
public readonly record struct CanvasPlace(int Text, int Row, int Column)
{
    public int Largest => Math.Max(Text, Math.Max(Row, Column));
}

/// <summary>
/// The tokens by which a row's pictures are found, and the places of its tokens: a picture's slices
/// lie on one canvas as they lay in the picture, its overview is spread over it, and the text goes
/// on behind the canvas' longer side.
/// </summary>
/// <param name="Features">The tokens that hold places of features, of pictures and of
/// videos.</param>
public sealed record CanvasTokens(
    (int Picture, int Video) Features, int ImageStart, int ImageEnd, int SliceStart, int SliceEnd,
    int Newline)
{
    /// <summary>The places of a row's tokens.</summary>
    /// <param name="ids">The row.</param>
    /// <param name="grids">Features of each of its views, overview first, in their order.</param>
    public CanvasPlace[] Places(ReadOnlySpan<int> ids, IReadOnlyList<PatchGrid> grids)
    {
        List<Frame> frames = Frames(ids, grids);
        var places = new CanvasPlace[ids.Length];
        int next = 0;
        for (int t = 0, f = 0; t < ids.Length;)
        {
            if (f == frames.Count || t < frames[f].First)
            {
                places[t++] = new(next, next, next);
                next++;
                continue;
            }

            Frame frame = frames[f++];
            // The start of a picture that follows at once is its own, not the one's before.
            t = f < frames.Count ? Math.Min(frame.End, frames[f].First) : frame.End;
            next = frame.Write(places.AsSpan(0, t), next);
        }

        return places;
    }

    // Runs of features: those behind the start of a slice belong to the picture before.
    private List<Frame> Frames(ReadOnlySpan<int> ids, IReadOnlyList<PatchGrid> grids)
    {
        var frames = new List<Frame>();
        for (int t = 0, view = 0; t < ids.Length; view++)
        {
            while (t < ids.Length && !IsFeature(ids[t])) t++;
            if (t == ids.Length) break;
            int start = t;
            while (t < ids.Length && ids[t] == ids[start]) t++;
            if (view == grids.Count || grids[view].Patches != t - start)
                throw new ArgumentException($"{t - start} places of features at token {start}, "
                    + (view < grids.Count ? $"view {view} has {grids[view].Patches}"
                        : $"there are {view} views"), nameof(grids));
            if (frames.Count == 0 || start == 0 || ids[start - 1] != SliceStart)
                frames.Add(new Frame(Math.Max(start - 1, 0)));
            frames[^1].Views.Add((start, t, grids[view]));
            frames[^1].End = t;
        }

        foreach (Frame frame in frames)
            while (frame.End < ids.Length && IsMarker(ids[frame.End])) frame.End++;
        return frames;
    }

    private bool IsFeature(int id) => id == Features.Picture || id == Features.Video;

    private bool IsMarker(int id) => id == ImageStart || id == ImageEnd || id == SliceStart
        || id == SliceEnd || id == Newline;

    // A picture's tokens, from the one in front of its overview on.
    private sealed class Frame(int first)
    {
        public int First { get; } = first;

        public int End { get; set; }

        public List<(int Start, int End, PatchGrid Grid)> Views { get; } = [];

        // Writes the places of its tokens and returns the place of the one behind.
        public int Write(Span<CanvasPlace> places, int at)
        {
            int count = Views.Count - 1, columns = Columns(count);
            int rows = count == 0 ? 1 : count / columns;
            if (rows * columns != count && count > 0) (rows, columns) = (1, count);
            PatchGrid overview = Views[0].Grid, slice = Views[Math.Min(1, count)].Grid;
            var canvas = new PatchGrid(rows * slice.Rows, Math.Max(columns, 1) * slice.Columns);
            places[First..].Fill(new(at, at, at));
            int before = Math.Max(at - 1, 0);
            places[First] = new(at, before, before);
            Put(places, Views[0].End, at, canvas.Rows, canvas.Columns);
            for (int i = 0; i < overview.Patches; i++)
                Put(places, Views[0].Start + i, at,
                    Spread(i / overview.Columns, canvas.Rows, overview.Rows),
                    Spread(i % overview.Columns, canvas.Columns, overview.Columns));
            for (int k = 0; k < count; k++)
            {
                var (start, end, grid) = Views[k + 1];
                int top = k / columns * slice.Rows, left = k % columns * slice.Columns;
                Put(places, start - 1, at, top, left);
                for (int i = 0; i < grid.Patches; i++)
                    Put(places, start + i, at, top + (i / grid.Columns), left + (i % grid.Columns));
                Put(places, end, at, top + grid.Rows - 1, left + grid.Columns - 1);
                // What stands between two rows of slices is at the end of the upper one.
                int next = k + 1 < count ? Views[k + 2].Start : end;
                if (next - end <= 2) continue;
                for (int t = end + 1; t < next - 1; t++)
                    Put(places, t, at, (((k / columns) + 1) * slice.Rows) - 1,
                        columns * slice.Columns);
            }

            return at + Math.Max(canvas.Rows, canvas.Columns) + 1;
        }

        // Rows of slices are told by what stands between them.
        private int Columns(int count)
        {
            for (int k = 1; k < count; k++)
                if (Views[k + 1].Start - Views[k].End > 2) return k;
            return count;
        }

        private static void Put(Span<CanvasPlace> places, int token, int at, int row, int column)
        {
            if (token < places.Length) places[token] = new(at, at + row, at + column);
        }

        // As torch has it: every operation in float.
        private static int Spread(int index, int canvas, int count)
        {
            if (count == 1) return 0;
            float last = canvas - 1, step = last / (count - 1);
            float place = index < count / 2
                ? step * index : last - (step * (count - 1 - index));
            return (int)MathF.Round(place, MidpointRounding.ToEven);
        }
    }
}
