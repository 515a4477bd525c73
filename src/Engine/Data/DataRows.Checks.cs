using System.Collections.Concurrent;
using System.Runtime.ExceptionServices;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Data;

/// <summary>Which rows are good: before the first step, and when one turns out bad later.</summary>
public sealed partial class DataRows
{
    // Decoding more pixels than this takes too long to wait for: idle threads do it then.
    private const long ManyPixels = 1L << 32;

    /// <summary>
    /// Reads a data file and checks each row's text and pictures. Bad rows are refused, or, with
    /// on_bad_row=skip, listed and left out. The pictures of a large set are decoded later, by
    /// <see cref="CheckPicture"/>.
    /// </summary>
    /// <param name="rest">The rows that training has of the same files, where these are a share.
    /// </param>
    /// <exception cref="InputException">The file cannot be used, or has bad rows.</exception>
    public static DataRows Open(
        DataSources sources, TrainArguments arguments, RowFormat format,
        Action<string> message, DataRows? rest = null) =>
        Open(sources, arguments, format, message, ManyPixels, rest);

    internal static DataRows Open(DataSources sources, TrainArguments arguments, RowFormat format,
        Action<string> message, long manyPixels, DataRows? rest = null)
    {
        var rows = new DataRows(sources, arguments, format, message, rest: rest);
        foreach (string file in rows.OtherFormats) message(file);
        rows.Settle(manyPixels, arguments.ModelMaxLength);
        return rows;
    }

    /// <summary>
    /// Reads rows that are only asked and need no answers. Bad ones are refused, or, with
    /// on_bad_row=skip, told and left out; their pictures are looked at when they are asked.
    /// </summary>
    /// <inheritdoc cref="Open(DataSources, TrainArguments, RowFormat, Action{string}, DataRows?)"/>
    public static DataRows Asked(
        DataSources sources, TrainArguments arguments, RowFormat format, Action<string> message)
    {
        var rows = new DataRows(sources, arguments, format, message, asked: true);
        foreach (string file in rows.OtherFormats) message(file);
        var checks = new RowCheck[rows.Count];
        InParallel(rows.Count, i =>
        {
            try
            {
                _ = rows.Prompt(i);
            }
            catch (BadRowException found)
            {
                checks[i] = new RowCheck { Bad = found.Row };
            }
        });
        rows.TakeOut(checks);
        if (rows.Count == 0) throw new InputException($"{sources}: no usable row is left");
        return rows;
    }

    // Refuses bad rows, or takes them out.
    private void TakeOut(RowCheck[] checks)
    {
        var bad = Bad(checks);
        if (bad.Count > 0 && !_skip) throw Refused(bad);
        foreach (BadRow row in bad) _message($"skipped: {row}");
        _bad = [.. checks.Select(c => c.Bad).OfType<BadRow>()];
        _rows = [.. _rows.Where((_, i) => checks[i].Bad is null)];
        _leftOut = new bool[_rows.Count];
    }

    private void Settle(long manyPixels, int maxLength)
    {
        RowCheck[] checks = Check(decode: false);
        PictureCheck pictures = Pictures(checks, Found);
        bool later = pictures.Pixels > manyPixels;
        if (!later) Decode(checks);
        for (int i = 0; i < checks.Length; i++) _sizes[_rows[i].Place] = checks[i].Size;
        TakeOut(checks);
        if (JpegFallback(checks) is { } fallback) _message($"{Path}: {fallback}");
        Counts = RowCounts.Of(checks, Unreadable.Count, _orient, maxLength);
        if (Counts.Rows == 0) throw new InputException($"{Path}: no usable row is left");
        if (!later) return;
        _pictures = pictures;
        _message($"{Path}: idle threads check its {Messages.Number(pictures.Count)} pictures in "
            + "full while training");
    }

    private InputException Refused(List<BadRow> bad)
    {
        const int most = 10;
        string more = bad.Count > most ? $"; and {bad.Count - most} more" : "";
        return new InputException(
            $"{bad.Count} of {Count + Unreadable.Count} rows are bad: "
            + string.Join("; ", bad.Take(most)) + more
            + " (cpmx data check lists them all, on_bad_row=skip leaves them out)");
    }

    /// <summary>
    /// Takes the places that the rows had in a run that goes on, so that their order is the same
    /// although rows have become bad since, or good.
    /// </summary>
    /// <param name="absent">As <see cref="Absent"/> was.</param>
    /// <param name="leftOut">As <see cref="LeftOut"/> was.</param>
    public void Restore(IReadOnlyCollection<int> absent, IReadOnlyCollection<int> leftOut)
    {
        var bad = _bad.Select(row => row.Place).Concat(leftOut).ToHashSet();
        var gone = absent.ToHashSet();
        _rows = [.. _set.Rows.Where(row => !gone.Contains(row.Place))];
        _leftOut = [.. _rows.Select(row => bad.Contains(row.Place))];
    }

    /// <inheritdoc/>
    public bool IsLeftOut(int row) => Volatile.Read(ref _leftOut[row]);

    /// <inheritdoc/>
    public bool LeaveOut(int row, BadRow why)
    {
        if (!_skip)
        {
            Interlocked.CompareExchange(ref _failure, why, null);
            return false;
        }

        if (!Interlocked.Exchange(ref _leftOut[row], true)) _message($"skipped: {why}");
        return true;
    }

    /// <summary>
    /// Decodes a picture that was not checked yet, for threads that have nothing else to do; false
    /// when all are checked. What is damaged is left out, or is the <see cref="Failure"/>.
    /// </summary>
    public bool CheckPicture() => _pictures?.Next() ?? false;

    // A damaged picture takes every row with it that names it.
    private void Found(Row first, int index, string reason)
    {
        string name = first.Pictures[index].Name;
        for (int i = 0; i < _rows.Count; i++)
            if (_rows[i].Pictures.Any(picture => picture.Name == name)
                && _rows[i].File == first.File)
                LeaveOut(i, _rows[i].Bad(reason).Row);
    }

    /// <summary>
    /// The unreadable rows and those that failed their check, in the file's order.
    /// </summary>
    public List<BadRow> Bad(RowCheck[] checks) =>
        [.. Unreadable.Concat(checks.Select(c => c.Bad).OfType<BadRow>())
            .OrderBy(row => row.Place)];

    /// <summary>
    /// Looks at every row, on all processors; decode: at its pictures whole, not at their headers
    /// alone. See <see cref="RowCheck"/>.
    /// </summary>
    public RowCheck[] Check(bool decode)
    {
        var checks = new RowCheck[Count];
        InParallel(Count, i => checks[i] = Check(_rows[i]));
        if (decode) Decode(checks);
        return checks;
    }

    private void Decode(RowCheck[] checks)
    {
        var damaged = new ConcurrentDictionary<(string File, string Path), string>();
        PictureCheck pictures = Pictures(
            checks, (row, index, reason) => damaged[(row.File, row.Pictures[index].Name)] = reason);
        InParallel(pictures.Count, _ => pictures.Next());
        if (damaged.IsEmpty) return;
        for (int i = 0; i < checks.Length; i++)
        {
            if (checks[i].Bad is not null) continue;
            foreach (RowPicture picture in _rows[i].Pictures)
                if (damaged.TryGetValue((_rows[i].File, picture.Name), out string? reason))
                    checks[i] = new RowCheck { Bad = _rows[i].Bad(reason).Row };
        }
    }

    private PictureCheck Pictures(RowCheck[] checks, Action<Row, int, string> damaged) => new(
        _rows.Zip(checks).Where(pair => pair.Second.Bad is null)
            .Select(pair => (pair.First, pair.Second.Pixels)), damaged, _message);

    /// <summary>
    /// Parallel.For whose failure is that of one row, not a bundle of them: what is wrong with the
    /// input goes first.
    /// </summary>
    internal static void InParallel(int count, Action<int> work)
    {
        try
        {
            Parallel.For(0, count, work);
        }
        catch (AggregateException several)
        {
            ExceptionDispatchInfo.Throw(
                several.InnerExceptions.FirstOrDefault(e => e is InputException)
                ?? several.InnerExceptions[0]);
        }
    }

    /// <summary>
    /// What is to be known of JPEG pictures among the rows, where libturbojpeg is missing.
    /// </summary>
    public static string? JpegFallback(RowCheck[] checks)
    {
        int count = checks.Sum(c => (c.Kinds ?? []).Count(
            k => k.StartsWith("JPEG", StringComparison.Ordinal)));
        return count > 0 && JpegDecoder.Fallback is { } how
            ? $"JPEG pictures: {Messages.Number(count)}, {how}" : null;
    }

    private RowCheck Check(Row row)
    {
        try
        {
            SlicePlan[] plans = Plans(row, out PictureInfo[] pictures);
            int[] lengths = Lengths(row);
            Sample sample = Build(row, plans, lengths);
            return new RowCheck(
                null, sample.FullLength, sample.Supervised, sample.Cut, sample.AnswersCut,
                pictures.Length, pictures.Count(picture => picture.Orientation != 1),
                pictures.Sum(picture => (long)picture.Size.Width * picture.Size.Height),
                [.. pictures.Select(picture => picture.Kind)])
            {
                Sounds = lengths.Length,
                Size = new(sample.InputIds.Length, sample.Supervised,
                    sample.Pictures.Sum(p => plans[p].Views * Joined(p)) + lengths.Length,
                    (int)sample.Pictures.Sum(p => Enumerable.Range(p, Joined(p))
                        .Sum(i => _strips.Value!.Patches(plans[i])))
                        + lengths.Sum(SoundScheme.Frames)),
            };
        }
        catch (BadRowException failure)
        {
            return new RowCheck { Bad = failure.Row, Pictures = row.Pictures.Count };
        }

        int Joined(int picture) => row.Pictures[picture].Times?.Count ?? 1;
    }
}
