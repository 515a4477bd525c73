using System.Runtime.ExceptionServices;
using System.Security.Cryptography;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// The usable rows of a data file under one configuration, and how each becomes tokens and patches.
/// Rows are made anew whenever they are asked for, by any thread; nothing but their text is kept.
/// </summary>
public sealed class TrainingRows : IRowLoader
{
    private readonly RowSet _set;
    private readonly SampleBuilder _builder;
    private readonly SlicingSpec _slicing;
    private readonly bool _orient;
    private readonly int _queries, _vocabulary;
    private readonly ThreadLocal<PatchStrips> _strips;
    private readonly IReadOnlyList<Row> _rows;

    private TrainingRows(string path, TrainArguments arguments, ModelSpec spec)
    {
        ModelFamily.RequirePrompts(spec.Family, arguments.LlmType);
        Path = path;
        _set = RowFile.Read(path);
        _rows = _set.Rows;
        string folder = arguments.ModelNameOrPath!;
        Tokenizer = Tokenizer.Load(folder);
        bool imageId = arguments.OfficialCompat ? spec.UseImageId : spec.Processor.UseImageId;
        (_queries, _vocabulary) = (spec.Resampler.Queries, spec.Decoder.VocabSize);
        _builder = new SampleBuilder(
            Tokenizer, ChatFormat.Load(folder, Tokenizer), new SampleOptions(
                _queries, arguments.ModelMaxLength, imageId, arguments.OfficialCompat), folder);
        _slicing = spec.Slicing with { MaxSliceNums = spec.SliceMode ? arguments.MaxSliceNums : 1 };
        _orient = arguments.ApplyExifOrientation;
        float[] mean = [.. spec.Processor.Mean.Select(v => (float)v)];
        float[] std = [.. spec.Processor.Std.Select(v => (float)v)];
        _strips = new ThreadLocal<PatchStrips>(() =>
            new PatchStrips(mean, std, _slicing.PatchSize));
    }

    private TrainingRows(TrainingRows all, IReadOnlyList<Row> rows)
    {
        (Path, _set, _builder, _slicing) = (all.Path, all._set, all._builder, all._slicing);
        (_orient, _queries, _strips, _rows) = (all._orient, all._queries, all._strips, rows);
        (Tokenizer, _vocabulary) = (all.Tokenizer, all._vocabulary);
    }

    public string Path { get; }

    public Tokenizer Tokenizer { get; }

    public int Count => _rows.Count;

    /// <summary>SHA-256 of the data file, by which a resumed run knows its rows again.</summary>
    public string Digest
    {
        get
        {
            using var stream = File.OpenRead(Path);
            return Convert.ToHexStringLower(SHA256.HashData(stream));
        }
    }

    /// <summary>Rows that the file itself rules out.</summary>
    public IReadOnlyList<BadRow> Unreadable => _set.Bad;

    /// <summary>Reads a data file without checking its rows.</summary>
    /// <exception cref="InputException">
    /// The file, or the model's tokenizer, cannot be used.
    /// </exception>
    public static TrainingRows Read(string path, TrainArguments arguments, ModelSpec spec) =>
        new(path, arguments, spec);

    /// <summary>
    /// Reads a data file and checks each row's text and its pictures' headers. Bad rows are
    /// refused, or, with on_bad_row=skip, listed and left out.
    /// </summary>
    /// <exception cref="InputException">The file cannot be used, or has bad rows.</exception>
    public static TrainingRows Open(
        string path, TrainArguments arguments, ModelSpec spec, Action<string> message)
    {
        var all = new TrainingRows(path, arguments, spec);
        bool skip = arguments.OnBadRow == BadRows.Skip;
        // What is left out must be known before the first step;
        // whole pictures tell more than headers.
        var checks = all.Check(decode: skip);
        var bad = all.Bad(checks);
        if (JpegFallback(checks) is { } fallback) message($"{path}: {fallback}");
        if (bad.Count == 0) return all;
        if (!skip)
        {
            const int most = 10;
            string more = bad.Count > most ? $"; and {bad.Count - most} more" : "";
            throw new InputException(
                $"{bad.Count} of {all.Count + all.Unreadable.Count} rows are bad: "
                + string.Join("; ", bad.Take(most)) + more
                + " (cpmx data check lists them all, on_bad_row=skip leaves them out)");
        }

        foreach (BadRow row in bad) message($"skipped: {row}");
        var good = all._rows.Where((_, i) => checks[i].Bad is null).ToList();
        if (good.Count == 0) throw new InputException($"{path}: no usable row is left");
        return new TrainingRows(all, good);
    }

    /// <summary>
    /// The unreadable rows and those that failed their check, in the file's order.
    /// </summary>
    public List<BadRow> Bad(RowCheck[] checks) =>
        [.. Unreadable.Concat(checks.Select(c => c.Bad).OfType<BadRow>())
            .OrderBy(row => row.Number)];

    /// <summary>Looks at every row, on all processors; see <see cref="RowCheck"/>.</summary>
    public RowCheck[] Check(bool decode)
    {
        var checks = new RowCheck[Count];
        InParallel(Count, i => checks[i] = Check(_rows[i], decode));
        return checks;
    }

    /// <summary>Parallel.For whose failure is that of one row, not a bundle of them: what is wrong
    /// with the input goes first.</summary>
    internal static void InParallel(int count, Action<int> body)
    {
        try
        {
            Parallel.For(0, count, body);
        }
        catch (AggregateException failures)
        {
            ExceptionDispatchInfo.Throw(
                failures.InnerExceptions.FirstOrDefault(e => e is InputException)
                ?? failures.InnerExceptions[0]);
        }
    }

    /// <summary>
    /// What is to be known of JPEG pictures among the rows, where libturbojpeg is missing.
    /// </summary>
    public static string? JpegFallback(RowCheck[] checks)
    {
        int count = checks.Sum(c => c.Kinds.Count(k => k.StartsWith("JPEG")));
        return count > 0 && JpegDecoder.Fallback is { } how
            ? $"JPEG pictures: {Messages.Number(count)}, {how}" : null;
    }

    /// <summary>
    /// The row with this id, or else with this number (counted from 1); -1 if there is none.
    /// </summary>
    public int Find(string id)
    {
        for (int i = 0; i < Count; i++)
            if (_rows[i].Id == id) return i;
        return int.TryParse(id, out int number)
            ? _rows.Index().FirstOrDefault(r => r.Item.Number == number, (-1, null!)).Index
            : -1;
    }

    public Row this[int row] => _rows[row];

    /// <summary>A row's tokens, labels and bounds.</summary>
    /// <exception cref="BadRowException">The row cannot be trained on.</exception>
    public Sample Sample(int row) => Build(_rows[row], Plans(_rows[row], out _));

    /// <inheritdoc/>
    public void Append(int row, Batch batch)
    {
        try
        {
            Append(_rows[row], batch);
        }
        catch (BadRowException failure)
        {
            throw new InputException(failure.Message, failure);
        }
    }

    private void Append(Row row, Batch batch)
    {
        SlicePlan[] plans = Plans(row, out PictureInfo[] pictures);
        Sample sample = Build(row, plans);
        int start = batch.Tokens.Count, firstView = batch.Grids.Count / 2;
        batch.Tokens.Add(sample.InputIds);
        for (int t = 0; t < sample.InputIds.Length; t++)
        {
            batch.Positions.Add(t);
            if (sample.Labels[t] == Data.Sample.Ignored) continue;
            batch.LabelRows.Add(start + t);
            batch.Targets.Add(sample.Labels[t]);
        }

        batch.SequenceStarts.Add(batch.Tokens.Count);
        batch.Samples++;
        for (int view = 0; view < sample.Bounds.Length; view++)
        {
            (int begin, int end) = (sample.Bounds[view].Start, sample.Bounds[view].End);
            if (end - begin != _queries)
                throw row.Bad($"a picture's place has {end - begin} tokens, expected {_queries}");
            batch.ImageBounds.Add(begin);
            batch.ImageBounds.Add(end);
            for (int q = 0; q < _queries; q++)
            {
                batch.Slots.Add(start + begin + q);
                batch.SlotFeatures.Add(((firstView + view) * _queries) + q);
            }
        }

        foreach (int picture in sample.Pictures)
            AppendPicture(row, picture, plans[picture], Turn(pictures[picture]), batch);
        if (batch.Grids.Count / 2 < firstView + sample.Bounds.Length)
            throw row.Bad("its text has more places for pictures than there are views");
    }

    private Sample Build(Row row, SlicePlan[] plans)
    {
        Sample sample = _builder.Build(row, plans);
        int largest = -1;
        foreach (int id in sample.InputIds) largest = Math.Max(largest, id);
        foreach (int label in sample.Labels) largest = Math.Max(largest, label);
        return largest < _vocabulary ? sample : throw row.Bad(
            $"the tokenizer gives it the token id {largest}, the model has {_vocabulary:N0} (vocab_size in "
            + "config.json): they do not belong together");
    }

    private void AppendPicture(Row row, int index, SlicePlan plan, int orientation, Batch batch)
    {
        PatchStrips strips = _strips.Value!;
        using Picture picture = Decode(row, index, orientation);
        for (int view = 0; view < plan.Views; view++)
        {
            PatchGrid grid = strips.Grid(plan, view);
            batch.Grids.Add(grid.Rows);
            batch.Grids.Add(grid.Columns);
            batch.PictureStarts.Add(batch.PictureStarts[batch.PictureStarts.Count - 1]
                + grid.Patches);
        }

        long floats = strips.Patches(plan) * strips.PatchLength;
        if (floats > Array.MaxLength)
            throw row.Bad($"picture \"{row.Pictures[index].Path}\" has too many patches");
        strips.Write(picture, plan, batch.Patches.Extend((int)floats));
    }

    private Picture Decode(Row row, int index, int orientation)
    {
        try
        {
            Picture picture = PictureDecoder.Decode(row.Locate(row.Pictures[index]));
            if (orientation == 1) return picture;
            using (picture) return picture.Oriented(orientation);
        }
        catch (InputException failure)
        {
            throw row.Bad(failure.Message);
        }
    }

    private SlicePlan[] Plans(Row row, out PictureInfo[] pictures)
    {
        var plans = new SlicePlan[row.Pictures.Count];
        pictures = new PictureInfo[plans.Length];
        for (int i = 0; i < plans.Length; i++)
        {
            pictures[i] = Probe(row, i);
            // Orientations 5 to 8 turn the picture on its side.
            PictureSize size = pictures[i].Size;
            if (Turn(pictures[i]) >= 5) size = new(size.Height, size.Width);
            plans[i] = Slicer.Plan(
                size, _slicing.MaxSliceNums, _slicing.ScaleResolution, _slicing.PatchSize);
        }

        return plans;
    }

    /// <summary>The EXIF orientation that is applied; 1 changes nothing.</summary>
    private int Turn(PictureInfo picture) => _orient ? picture.Orientation : 1;

    private static PictureInfo Probe(Row row, int index)
    {
        try
        {
            return PictureDecoder.Probe(row.Locate(row.Pictures[index]));
        }
        catch (InputException failure)
        {
            throw row.Bad(failure.Message);
        }
    }

    private RowCheck Check(Row row, bool decode)
    {
        try
        {
            SlicePlan[] plans = Plans(row, out PictureInfo[] pictures);
            Sample sample = Build(row, plans);
            int turned = 0;
            for (int i = 0; i < plans.Length; i++)
            {
                if (pictures[i].Orientation != 1) turned++;
                if (decode) Decode(row, i, Turn(pictures[i])).Dispose();
            }

            return new RowCheck(
                null, sample.FullLength, sample.Supervised, sample.Cut, row.Pictures.Count, turned,
                [.. pictures.Select(p => p.Kind)]);
        }
        catch (BadRowException failure)
        {
            return new RowCheck(failure.Row, 0, 0, false, row.Pictures.Count, 0, []);
        }
    }
}

/// <summary>What one row is like: why it is bad, or its length and pictures.</summary>
/// <param name="Bad">The reason, or null for a usable row.</param>
/// <param name="Tokens">Tokens before a cut to model_max_length.</param>
/// <param name="Supervised">Tokens that carry a label, after the cut.</param>
/// <param name="Cut">Whether it is longer than model_max_length.</param>
/// <param name="Pictures">Pictures it names.</param>
/// <param name="Turned">Those of them with an EXIF orientation.</param>
/// <param name="Kinds">The kind of each of them (<see cref="PictureInfo.Kind"/>).</param>
public readonly record struct RowCheck(
    BadRow? Bad, int Tokens, int Supervised, bool Cut, int Pictures, int Turned,
    IReadOnlyList<string> Kinds);
