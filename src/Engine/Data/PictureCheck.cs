using System.Diagnostics;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Decodes each picture file of some rows once, so that a damaged one is known before a step needs
/// it: a header says little about the bytes behind it. Any number of threads may take part.
/// </summary>
public sealed class PictureCheck
{
    private const double SecondsBetweenLines = 10;

    private readonly List<(Row Row, int Index)> _pictures = [];
    private readonly Action<Row, int, string> _damaged;
    private readonly Action<string> _message;
    private readonly long _started = Stopwatch.GetTimestamp();
    private int _next, _done;
    private long _told;

    /// <param name="rows">The rows, and how many pixels all pictures of each have.</param>
    /// <param name="damaged">Takes a row that names a damaged picture, which one, and why it is;
    /// called by any thread, once for each file.</param>
    /// <param name="message">Takes lines on the progress.</param>
    public PictureCheck(
        IEnumerable<(Row Row, long Pixels)> rows, Action<Row, int, string> damaged,
        Action<string> message)
    {
        (_damaged, _message) = (damaged, message);
        // A path means the same file in every row of one data file.
        var seen = new HashSet<(string File, string Path)>();
        foreach (var (row, pixels) in rows)
        {
            int before = _pictures.Count;
            for (int i = 0; i < row.Pictures.Count; i++)
                if (seen.Add((row.File, row.Pictures[i].Name))) _pictures.Add((row, i));
            if (_pictures.Count > before) Pixels += pixels;
        }
    }

    /// <summary>Picture files.</summary>
    public int Count => _pictures.Count;

    /// <summary>Pixels of all of them, as their headers say.</summary>
    public long Pixels { get; }

    /// <summary>Decodes the next file; false when none is left.</summary>
    public bool Next()
    {
        // Asked again and again behind the end, a counter would run over.
        if (Volatile.Read(ref _next) >= Count) return false;
        int number = Interlocked.Increment(ref _next) - 1;
        if (number >= Count) return false;
        var (row, index) = _pictures[number];
        try
        {
            DataRows.Decode(row, index).Dispose();
        }
        catch (BadRowException failure)
        {
            _damaged(row, index, failure.Row.Reason);
        }

        Tell(Interlocked.Increment(ref _done));
        return true;
    }

    private void Tell(int done)
    {
        long told = Volatile.Read(ref _told), now = Stopwatch.GetTimestamp();
        bool ends = done == Count;
        if (Stopwatch.GetElapsedTime(ends ? _started : Math.Max(told, _started), now).TotalSeconds
            < SecondsBetweenLines || Interlocked.CompareExchange(ref _told, now, told) != told)
            return;
        _message(ends
            ? $"all {Messages.Number(Count)} pictures are checked"
            : $"{Messages.Number(done)} of {Messages.Number(Count)} pictures are checked");
    }
}
