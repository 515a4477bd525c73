using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Frames of one size as one picture: two or three beside or below each other, whichever is nearer
/// to a square, four as two by two, more in a row, black bars of six pixels between them.
/// </summary>
/// <param name="Frame">The size of a frame.</param>
/// <param name="Columns">Frames beside each other.</param>
/// <param name="Rows">Frames below each other.</param>
internal readonly record struct FrameMosaic(PictureSize Frame, int Columns, int Rows)
{
    private const int Bar = 6;

    public PictureSize Size => new(
        (Columns * (Frame.Width + Bar)) - Bar, (Rows * (Frame.Height + Bar)) - Bar);

    /// <exception cref="BadRowException">Their sizes differ, or they are too large together.
    /// </exception>
    public static FrameMosaic Of(Row row, PictureSize[] frames)
    {
        PictureSize frame = frames[0];
        foreach (PictureSize other in frames)
            if (other != frame)
                throw row.Bad($"has frames of {frame.Width} x {frame.Height} and of {other.Width} "
                    + $"x {other.Height}, which are to be one picture: give them one size, or set "
                    + "video_stack_frames to 1");
        if ((long)frames.Length * (frame.Width + Bar) * (frame.Height + Bar)
            > PictureDecoder.MaxPixels)
            throw row.Bad($"has {frames.Length} frames of {frame.Width} x {frame.Height}, which "
                + "are to be one picture: more pixels than are read; scale them down, or set "
                + "video_stack_frames to 1");
        var beside = new FrameMosaic(frame, frames.Length, 1);
        var below = new FrameMosaic(frame, 1, frames.Length);
        return frames.Length switch
        {
            4 => new(frame, 2, 2),
            2 or 3 when below.OffSquare < beside.OffSquare => below,
            _ => beside,
        };
    }

    /// <summary>The picture.</summary>
    /// <param name="row">Theirs.</param>
    /// <param name="frames">The sizes of the frames.</param>
    /// <param name="decode">Decodes one.</param>
    public static Picture Join(Row row, PictureSize[] frames, Func<int, Picture> decode)
    {
        FrameMosaic mosaic = Of(row, frames);
        var memory = PictureMemory.Enter(3L * mosaic.Size.Width * mosaic.Size.Height);
        var whole = new Picture(mosaic.Size.Width, mosaic.Size.Height);
        whole.Holds(memory);
        try
        {
            whole.Rgb.Clear();
            for (int i = 0; i < frames.Length; i++)
            {
                using Picture frame = decode(i);
                int left = i % mosaic.Columns * (frame.Width + Bar);
                int top = i / mosaic.Columns * (frame.Height + Bar);
                for (int y = 0; y < frame.Height; y++)
                    frame.Row(y).CopyTo(whole.Row(top + y)[(3 * left)..]);
            }

            return whole;
        }
        catch
        {
            whole.Dispose();
            throw;
        }
    }

    private double OffSquare => Math.Abs(((double)Size.Width / Size.Height) - 1);
}
