using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Rows of one forward pass on the host, packed: no padding anywhere. Text rows follow each other
/// in Tokens, pictures follow each other in Patches, in the order of their rows. Its buffers are
/// reused, so that filling one again allocates only when something is larger than ever before.
/// </summary>
public sealed class Batch
{
    /// <summary>Rows in this batch.</summary>
    public int Samples { get; set; }

    /// <summary>Token ids of all rows.</summary>
    public Growing<int> Tokens { get; } = new();

    /// <summary>Position of each token in its row.</summary>
    public Growing<int> Positions { get; } = new();

    /// <summary>
    /// The places of the tokens in full, where the model tells rows and columns apart; else empty.
    /// </summary>
    public Growing<CanvasPlace> Places { get; } = new();

    /// <summary>Where each row starts in Tokens, and the end.</summary>
    public Growing<int> SequenceStarts { get; } = new();

    /// <summary>Tokens whose output is supervised, as indices into Tokens.</summary>
    public Growing<int> LabelRows { get; } = new();

    /// <summary>The token that each of LabelRows should predict.</summary>
    public Growing<int> Targets { get; } = new();

    /// <summary>
    /// Pixels, one row of channels * p * p values per patch, in (channel, y, x) order.
    /// </summary>
    public Growing<float> Patches { get; } = new();

    /// <summary>Rows and columns of patches of each picture, two numbers each.</summary>
    public Growing<int> Grids { get; } = new();

    /// <summary>Where each picture starts in Patches, in patches, and the end.</summary>
    public Growing<int> PictureStarts { get; } = new();

    /// <summary>
    /// When each view is seen, and with which others; those that are missing at the end are
    /// pictures, each by itself.
    /// </summary>
    public Growing<ViewTime> Times { get; } = new();

    /// <summary>
    /// First token and end of each picture's place in its row, counted in the row.
    /// </summary>
    public Growing<int> ImageBounds { get; } = new();

    /// <summary>
    /// Tokens whose embedding is replaced by a picture feature, as indices into Tokens.
    /// </summary>
    public Growing<int> Slots { get; } = new();

    /// <summary>The picture feature of each slot, counted over all pictures.</summary>
    public Growing<int> SlotFeatures { get; } = new();

    /// <summary>
    /// Tokens whose embedding is replaced by a sound feature, as indices into Tokens; they take
    /// the features of all clips in order.
    /// </summary>
    public Growing<int> SoundSlots { get; } = new();

    // Log-mel features of all clips, frame by frame, and where each begins, in frames.
    private readonly Growing<float> _mel = new();
    private readonly Growing<int> _clipStarts = new();

    /// <summary>Clips of sound.</summary>
    public int Clips => Math.Max(0, _clipStarts.Count - 1);

    /// <summary>Features of all pictures.</summary>
    public int Features { get; private set; }

    // Of the batch that this one is a part of.
    private int _longestView, _longestClip;

    /// <summary>Patches of the largest view; of a part, that of the whole batch.</summary>
    public int LongestView
    {
        get
        {
            int longest = _longestView;
            for (int i = 1; i < PictureStarts.Count; i++)
                longest = Math.Max(longest, PictureStarts[i] - PictureStarts[i - 1]);
            return longest;
        }
    }

    /// <summary>Frames of the longest clip; of a part, that of the whole batch.</summary>
    public int LongestClip
    {
        get
        {
            int longest = _longestClip;
            for (int i = 0; i < Clips; i++) longest = Math.Max(longest, ClipFrames(i));
            return longest;
        }
    }

    public void Clear()
    {
        Samples = Features = _longestView = _longestClip = 0;
        foreach (var buffer
            in (ReadOnlySpan<Growing<int>>)[Tokens, Positions, SequenceStarts, LabelRows,
            Targets, Grids, PictureStarts, ImageBounds, Slots, SlotFeatures, SoundSlots,
            _clipStarts])
            buffer.Clear();
        _mel.Clear();
        Patches.Clear();
        Places.Clear();
        Times.Clear();
        SequenceStarts.Add(0);
        PictureStarts.Add(0);
    }

    /// <summary>
    /// Adds a row's tokens and the places of its pictures, which are added behind it; of a row
    /// whose first tokens have been run, those from there on.
    /// </summary>
    /// <param name="ids">The whole row.</param>
    /// <param name="bounds">Where its pictures' features go.</param>
    /// <param name="from">The first token that has not been run.</param>
    /// <param name="places">See <see cref="RowFormat.Places"/>; null where tokens are
    /// counted.</param>
    public void AddRow(ReadOnlySpan<int> ids, ReadOnlySpan<ImageBound> bounds, int from = 0,
        CanvasPlace[]? places = null)
    {
        int start = Tokens.Count - from;
        Tokens.Add(ids[from..]);
        for (int t = from; t < ids.Length; t++) Positions.Add(places?[t].Text ?? t);
        Places.Add(places.AsSpan(places is null ? 0 : from));
        SequenceStarts.Add(Tokens.Count);
        Samples++;
        int feature = Features;
        foreach (ImageBound bound in bounds)
        {
            if (bound.Start < from) continue;
            ImageBounds.Add(bound.Start);
            ImageBounds.Add(bound.End);
            for (int t = bound.Start; t < bound.End; t++)
            {
                Slots.Add(start + t);
                SlotFeatures.Add(feature++);
            }
        }
    }

    /// <summary>Adds the places of sounds in the row that came last, from a token of it on.
    /// </summary>
    public void AddSoundSlots(ReadOnlySpan<ImageBound> bounds, int from)
    {
        int start = SequenceStarts[SequenceStarts.Count - 2] - from;
        foreach (ImageBound bound in bounds)
            for (int t = bound.Start; t < bound.End; t++) SoundSlots.Add(start + t);
    }

    /// <summary>Adds a clip; its bands frame by frame go into what is returned.</summary>
    public Span<float> AddClip(int frames, int bands)
    {
        if (_clipStarts.Count == 0) _clipStarts.Add(0);
        _clipStarts.Add(_clipStarts[_clipStarts.Count - 1] + frames);
        return _mel.Extend(checked(frames * bands));
    }

    /// <summary>Frames of a clip.</summary>
    public int ClipFrames(int clip) => _clipStarts[clip + 1] - _clipStarts[clip];

    /// <summary>A clip's bands, frame by frame.</summary>
    public ReadOnlySpan<float> Clip(int clip)
    {
        int bands = _mel.Count / _clipStarts[Clips];
        return _mel.Span.Slice(_clipStarts[clip] * bands, ClipFrames(clip) * bands);
    }

    /// <summary>
    /// Becomes a part of a batch: its views from a number on, as many as have so few patches
    /// together, but at least one, and never a part of those that become features together.
    /// </summary>
    /// <returns>The first view that is left.</returns>
    public int TakeViews(Batch whole, int first, int mostPatches)
    {
        Clear();
        ReadOnlySpan<int> starts = whole.PictureStarts.Span;
        int views = whole.Grids.Count / 2, end = first;
        do
        {
            int next = end + 1;
            while (next < Math.Min(views, whole.Times.Count) && whole.Times[next].Joined) next++;
            if (end > first && starts[next] - starts[first] > mostPatches) break;
            end = next;
        }
        while (end < views);
        _longestView = whole.LongestView;
        Grids.Add(whole.Grids.Span[(2 * first)..(2 * end)]);
        for (int i = first; i < end; i++) PictureStarts.Add(starts[i + 1] - starts[first]);
        int length = whole.Patches.Count / starts[views];
        Patches.Add(whole.Patches.Span[(starts[first] * length)..(starts[end] * length)]);
        for (int i = first; i < Math.Min(end, whole.Times.Count); i++) Times.Add(whole.Times[i]);
        return end;
    }

    /// <summary>
    /// Becomes a part of a batch: so many of its tokens from one on, with their places of features,
    /// of which pictures' are counted over the whole batch.
    /// </summary>
    public void TakeTokens(Batch whole, int first, int count)
    {
        Clear();
        int end = first + count;
        Tokens.Add(whole.Tokens.Span[first..end]);
        Positions.Add(whole.Positions.Span[first..end]);
        if (whole.Places.Count > 0) Places.Add(whole.Places.Span[first..end]);
        SequenceStarts.Clear();
        foreach (int start in whole.SequenceStarts.Span)
            SequenceStarts.Add(Math.Clamp(start - first, 0, count));
        AddWithin(LabelRows, whole.LabelRows);
        AddWithin(SoundSlots, whole.SoundSlots);
        AddWithin(Slots, whole.Slots);
        for (int i = 0; i < whole.Slots.Count; i++)
            if (whole.Slots[i] >= first && whole.Slots[i] < end)
                SlotFeatures.Add(whole.SlotFeatures[i]);

        void AddWithin(Growing<int> to, Growing<int> tokens)
        {
            foreach (int token in tokens.Span)
                if (token >= first && token < end) to.Add(token - first);
        }
    }

    /// <summary>Becomes a part of a batch: one of its clips.</summary>
    public void TakeClip(Batch whole, int clip)
    {
        Clear();
        _longestClip = whole.LongestClip;
        ReadOnlySpan<float> bands = whole.Clip(clip);
        int frames = whole.ClipFrames(clip);
        bands.CopyTo(AddClip(frames, bands.Length / frames));
    }

    /// <summary>
    /// Adds the views of a picture, which have so many features in all; false where they are too
    /// many patches. Without a picture the pixels are undefined.
    /// </summary>
    public bool TryAddPicture(PatchStrips strips, Picture? picture, SlicePlan plan, int features)
    {
        long floats = strips.Patches(plan) * strips.PatchLength;
        if (floats > Array.MaxLength) return false;
        for (int view = 0; view < plan.Views; view++) AddView(strips.Grid(plan, view));
        Features += features;
        Span<float> patches = Patches.Extend((int)floats);
        if (picture is not null) strips.Write(picture, plan, patches);
        return true;
    }

    /// <summary>
    /// Adds a group of frames, which have so many features together: the first view of each, then
    /// the second of each, and so on; false where they are too many patches.
    /// </summary>
    /// <param name="strips">Makes their patches.</param>
    /// <param name="decode">The frame of a number from 0; null leaves the pixels undefined.</param>
    /// <param name="plans">How each is cut, all into as many views.</param>
    /// <param name="times">The temporal id of each; -1 for none.</param>
    /// <param name="features">Features of the group.</param>
    public bool TryAddFrames(PatchStrips strips, Func<int, Picture>? decode,
        ReadOnlySpan<SlicePlan> plans, IReadOnlyList<int> times, int features)
    {
        long floats = 0;
        foreach (SlicePlan plan in plans) floats += strips.Patches(plan) * strips.PatchLength;
        if (floats > Array.MaxLength) return false;
        while (Times.Count < Grids.Count / 2) Times.Add(ViewTime.None);
        int views = plans[0].Views;
        // Where each view of each frame begins.
        var starts = new int[plans.Length, views];
        int at = 0;
        for (int view = 0; view < views; view++)
            for (int frame = 0; frame < plans.Length; frame++)
            {
                PatchGrid grid = strips.Grid(plans[frame], view);
                AddView(grid);
                Times.Add(new ViewTime(times[frame], Joined: frame > 0));
                starts[frame, view] = at;
                at += grid.Patches * strips.PatchLength;
            }

        Features += features;
        Span<float> patches = Patches.Extend((int)floats);
        for (int frame = 0; decode is not null && frame < plans.Length; frame++)
        {
            SlicePlan plan = plans[frame];
            using Picture picture = decode(frame);
            if (views == 1)
            {
                strips.Write(picture, plan, patches[starts[frame, 0]..]);
                continue;
            }

            var all = new float[strips.Patches(plan) * strips.PatchLength];
            strips.Write(picture, plan, all);
            int from = 0;
            for (int view = 0; view < views; view++)
            {
                int length = strips.Grid(plan, view).Patches * strips.PatchLength;
                all.AsSpan(from, length).CopyTo(patches[starts[frame, view]..]);
                from += length;
            }
        }

        return true;
    }

    private void AddView(PatchGrid grid)
    {
        Grids.Add(grid.Rows);
        Grids.Add(grid.Columns);
        PictureStarts.Add(PictureStarts[PictureStarts.Count - 1] + grid.Patches);
    }
}

/// <summary>When a view is seen.</summary>
/// <param name="Id">Its temporal id; -1 for none.</param>
/// <param name="Joined">Whether it becomes features together with the view before.</param>
public readonly record struct ViewTime(int Id, bool Joined)
{
    public static ViewTime None => new(-1, false);
}

/// <summary>A list whose memory stays when it is cleared.</summary>
public sealed class Growing<T>
    where T : unmanaged
{
    private T[] _items = [];

    public int Count { get; private set; }

    public ReadOnlySpan<T> Span => _items.AsSpan(0, Count);

    public T this[int index] => Span[index];

    public void Clear() => Count = 0;

    public void Add(T item) => Extend(1)[0] = item;

    public void Add(ReadOnlySpan<T> items) => items.CopyTo(Extend(items.Length));

    /// <summary>Room for more items, of undefined content.</summary>
    public Span<T> Extend(int count)
    {
        int end = checked(Count + count);
        if (end > _items.Length)
            Array.Resize(ref _items,
                Math.Max(end, (int)Math.Min(Array.MaxLength, 2L * _items.Length)));
        var room = _items.AsSpan(Count, count);
        Count = end;
        return room;
    }
}
