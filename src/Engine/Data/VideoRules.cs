using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Data;

/// <summary>By which of the official rules frames are chosen.</summary>
public enum FrameRule
{
    /// <summary>Every so many frames; of too many, so many at even distances (V-2_6).</summary>
    Steps,

    /// <summary>So many at even distances, some of which become one view together
    /// (V-4_5).</summary>
    Packed,

    /// <summary>One at the start of each second; of a long video, by tenths (V-4_6).</summary>
    Seconds,
}

/// <summary>
/// How a family shows a video: its frames as pictures, one behind the other. What a run does not
/// set is as the family's own code has it.
/// </summary>
/// <param name="Fps">Frames of a second (video_fps).</param>
/// <param name="MaxFrames">Most frames, where several are joined, most groups (video_max_frames).
/// </param>
/// <param name="MaxSlices">Most tiles of a frame (video_max_slice_nums).</param>
public sealed record VideoRules(FrameRule Rule, double Fps, int MaxFrames, int MaxSlices)
{
    /// <summary>Most frames that are joined; 1 where none are.</summary>
    public int MaxPacking { get; init; } = 1;

    /// <summary>Frames that are joined (video_packing); null leaves it to the rule.</summary>
    public int? Packing { get; init; }

    /// <summary>
    /// Whether frames have a token of their own for places of features, nothing between them, and
    /// pictures beside them keep their numbers; else a line end stands between, and nothing of the
    /// row is numbered.
    /// </summary>
    public bool Native { get; init; }

    /// <summary>The resolution of frames, where it is not that of pictures.</summary>
    public int? ScaleResolution { get; init; }

    /// <summary>
    /// Frames of each second: the first is a picture, those between it and the next are one more
    /// (<see cref="FrameMosaic"/>; video_stack_frames).
    /// </summary>
    public int Stacked { get; init; } = 1;

    /// <summary>Whether a video carries a number, where pictures do.</summary>
    public bool Numbered { get; init; }

    /// <summary>The rules of a run.</summary>
    /// <exception cref="InputException">The model's frames are not joined in that way.</exception>
    public VideoRules Of(TrainArguments run)
    {
        if (run.VideoPacking is not null && Rule != FrameRule.Packed)
            throw new InputException(
                "video_packing: the model does not join frames: leave it out");
        if (run.VideoStackFrames is not null && Rule != FrameRule.Seconds)
            throw new InputException("video_stack_frames: the model does not show several frames "
                + "as one picture: leave it out");
        return this with
        {
            Fps = run.VideoFps ?? Fps,
            MaxFrames = run.VideoMaxFrames ?? MaxFrames,
            MaxSlices = run.VideoMaxSliceNums ?? MaxSlices,
            MaxPacking = Math.Max(MaxPacking, run.VideoPacking ?? 0),
            Packing = run.VideoPacking,
            Stacked = run.VideoStackFrames ?? Stacked,
        };
    }

    /// <summary>The frames that are taken of a video.</summary>
    /// <param name="total">Frames that it has.</param>
    /// <param name="rate">Frames of its second; null where they are chosen already: then all are
    /// taken, or of too many, some at even distances.</param>
    public ChosenFrames Choose(int total, double? rate)
    {
        if (rate is not { } of)
        {
            int most = (int)Math.Min(int.MaxValue, (long)MaxFrames * MaxPacking);
            int[] all = total > most ? Even(total, most) : [.. Enumerable.Range(0, total)];
            return Joined(all, total, Fps,
                Math.Clamp((all.Length + MaxFrames - 1) / MaxFrames, 1, MaxPacking));
        }

        return Rule switch
        {
            FrameRule.Steps => new(Steps(total, of)),
            FrameRule.Packed => Packed(total, of),
            _ => Between(Seconds(total, of), total, of),
        };
    }

    private int[] Steps(int total, double rate)
    {
        int step = (int)Math.Max(1, Math.Round(rate / Fps));
        int count = (total + step - 1) / step;
        return count <= MaxFrames ? [.. Enumerable.Range(0, count).Select(i => i * step)]
            : [.. Even(count, MaxFrames).Select(i => i * step)];
    }

    private ChosenFrames Packed(int total, double rate)
    {
        double duration = total / rate, count;
        int packing = 1;
        if (Fps * Math.Truncate(duration) <= MaxFrames)
        {
            count = Math.Round(Math.Min(Fps, Math.Round(rate)) * Math.Min(MaxFrames, duration));
        }
        else
        {
            double wanted = Math.Ceiling(duration * Fps / MaxFrames);
            packing = (int)Math.Min(wanted, MaxPacking);
            count = wanted <= MaxPacking
                ? Math.Round(duration * Fps) : (double)MaxFrames * MaxPacking;
        }

        // The official function has none of a shorter one, and fails.
        return Joined(Even(total, (int)Math.Clamp(count, 1, 1 << 20)), total, rate, packing);
    }

    private ChosenFrames Joined(int[] frames, int total, double rate, int packing) =>
        Rule != FrameRule.Packed ? new(frames)
            : new(frames, [.. frames.Select(frame => TemporalId(frame / rate, total / rate))],
                Packing is { } forced ? Math.Min(forced, MaxPacking) : packing);

    /// <summary>
    /// The nearest tenth of a second before the end, counted as the official function does, so that
    /// some numbers are one less than the tenth's.
    /// </summary>
    internal static int TemporalId(double seconds, double duration)
    {
        double last = Math.Max(0, Math.Ceiling(duration / 0.1) - 1);
        double below = Math.Clamp(Math.Floor(seconds / 0.1), 0, last), best = below;
        for (double mark = Math.Max(0, below - 1); mark <= Math.Min(last, below + 1); mark++)
            if (Math.Abs((mark * 0.1) - seconds) < Math.Abs((best * 0.1) - seconds)) best = mark;
        return (int)(best * 0.1 / 0.1);
    }

    private int[] Seconds(int total, double rate)
    {
        double duration = total / rate;
        if (duration * Fps <= MaxFrames)
            return [.. Enumerable.Range(0, (int)Math.Ceiling(duration * Fps))
                .Select(i => Math.Min((int)(i * rate / Fps), total - 1))];
        return Thinned([.. Enumerable.Range(0, (int)(duration / 0.1))
            .Select(i => Math.Min((int)(i / 10.0 * rate), total - 1))], MaxFrames);
    }

    // Behind each of the frames those up to the next second, as one picture.
    private ChosenFrames Between(int[] frames, int total, double rate)
    {
        if (Stacked == 1) return new(frames);
        double duration = total / rate * Fps;
        int[] between = Thinned([.. Enumerable.Range(0, (int)Math.Ceiling(duration))
            .SelectMany(i => Enumerable.Range(1, Stacked - 1)
                .Select(j => i + (j / (double)Stacked)))
            .Where(time => time < duration)
            .Select(time => Math.Min((int)(time * rate / Fps), total - 1))],
            (int)Math.Min(int.MaxValue, (long)MaxFrames * (Stacked - 1)));
        var all = new List<int>();
        var shown = new List<int>();
        for (int i = 0; i < frames.Length; i++)
        {
            int[] group = [.. between.Skip(i * (Stacked - 1)).Take(Stacked - 1)];
            all.Add(frames[i]);
            shown.Add(1);
            if (group.Length == 0) continue;
            all.AddRange(group);
            shown.Add(group.Length);
        }

        return new([.. all]) { Shown = [.. shown] };
    }

    private static int[] Thinned(int[] frames, int most)
    {
        if (frames.Length <= most) return frames;
        double step = most > 1 ? (frames.Length - 1) / (double)(most - 1) : 0;
        return [.. Enumerable.Range(0, most)
            .Select(i => frames[i > 0 && i == most - 1 ? ^1 : (int)(i * step)])];
    }

    // The middles of so many equal parts.
    private static int[] Even(int total, int count)
    {
        double gap = (double)total / count;
        return [.. Enumerable.Range(0, count).Select(i => (int)((i * gap) + (gap / 2)))];
    }
}

/// <summary>Frames of a video, by number from 0.</summary>
/// <param name="Ids">The temporal id of each, where frames are joined.</param>
/// <param name="Packing">How many are joined.</param>
public sealed record ChosenFrames(int[] Frames, int[]? Ids = null, int Packing = 1)
{
    /// <summary>How many of the frames each picture shows; null where all show one.</summary>
    public int[]? Shown { get; init; }
}
