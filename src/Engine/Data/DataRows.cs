using System.Collections.Concurrent;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>The prompt of a row's last answer.</summary>
/// <param name="Tokens">Its tokens.</param>
/// <param name="Pictures">The tokens that each of its pictures and sounds takes.</param>
/// <param name="Append">Puts a part of it into a batch, from a token to another, which split none
/// of these.</param>
public sealed record RowPrompt(
    int Tokens, IReadOnlyList<ImageBound> Pictures, Action<Batch, int, int> Append);

/// <summary>
/// The usable rows of a data file under one configuration, and how each becomes tokens and patches.
/// Rows are made anew whenever they are asked for, by any thread; nothing but their text is kept.
/// Which rows there are, and so their order in training, is settled by <see cref="Open"/> (or by
/// the checkpoint that a run goes on from); a row that turns out bad later keeps its place and is
/// left out there.
/// </summary>
public sealed partial class DataRows : IRowLoader
{
    private readonly RowSet _set;
    private readonly RowFormat _format;
    private readonly SampleBuilder _builder;
    private readonly SlicingSpec _slicing, _frameSlicing;
    private readonly bool _orient, _skip;
    private readonly ThreadLocal<PatchStrips> _strips, _frameStrips;
    private readonly Action<string> _message;
    private readonly Dictionary<int, RowSize> _sizes = [];
    private readonly ConcurrentDictionary<(int Row, int Picture), SlicePlan> _plans = [];
    private IReadOnlyList<Row> _rows;
    private bool[] _leftOut;
    private BadRow[] _bad = [];
    private PictureCheck? _pictures;
    private BadRow? _failure;
    private WholeSet? _whole;

    private DataRows(DataSources sources, TrainArguments arguments, RowFormat format,
        Action<string>? message, bool asked = false, DataRows? rest = null)
    {
        format.RequireLlmType(arguments.LlmType, arguments.OfficialCompat);
        Path = sources;
        // Both shares of one set are of one reading.
        WholeSet whole = rest?._whole is { } read && read.Of == sources with { Share = null }
            ? read with { Formats = [] }
            : Read(sources, new RowOptions(asked, arguments.TrainOn == TrainOn.Last));
        if (rest is not null) rest._whole = null;
        else if (sources.Share is not null) _whole = whole;
        (_set, Digest, OtherFormats) = Shared(sources, whole, arguments.BoxFormat);
        if (_set.Rows.Any(row => row.Turns[^1].Calls is not null))
            _set = _set with
            {
                Rows = [.. _set.Rows.Select(row => row.Turns[^1].Calls is null ? row
                    : row with { Expected = format.Prompts.Said(row.Turns[^1]) })],
            };
        VideoRules? videos = format.Video?.Of(arguments);
        _set = ChooseFrames(_set, videos);
        _rows = _set.Rows;
        _leftOut = new bool[_rows.Count];
        _skip = arguments.OnBadRow == BadRows.Skip;
        _message = message ?? (_ => { });
        _format = format;
        _builder = new SampleBuilder(
            format, arguments.ModelMaxLength, arguments.OfficialCompat);
        _slicing = format.SlicingUpTo(arguments.MaxSliceNums);
        _frameSlicing = format.SlicingOfFrames(videos?.MaxSlices ?? 1);
        _orient = arguments.ApplyExifOrientation;
        _strips = new ThreadLocal<PatchStrips>(() => format.NewStrips());
        _frameStrips = new ThreadLocal<PatchStrips>(() => format.NewStrips(ofFrames: true));
    }

    /// <summary>The data file, or several, for messages.</summary>
    public string Path { get; }

    /// <summary>Files of other formats than the official one, each with its format.</summary>
    public IReadOnlyList<string> OtherFormats { get; }

    public RowFormat Format => _format;

    public int Count => _rows.Count;

    /// <summary>
    /// SHA-256 of the data as it was read, by which a resumed run knows its rows again.
    /// </summary>
    public string Digest { get; }

    /// <summary>The files of all pictures.</summary>
    public IEnumerable<string> PictureFiles =>
        _rows.SelectMany(row => row.Pictures.SelectMany(picture => picture.Each)
            .Where(file => file.Bytes is null).Select(row.Locate));

    /// <summary>What the usable rows are like; known when they were opened.</summary>
    public RowCounts? Counts { get; private set; }

    /// <summary>Rows of the file that have no place in the order, by number.</summary>
    public IReadOnlyList<int> Absent =>
        [.. _set.Rows.Select(row => row.Place).Except(_rows.Select(row => row.Place))];

    /// <summary>Rows that keep their place and are left out there, by number.</summary>
    public IReadOnlyList<int> LeftOut =>
        [.. _rows.Where((_, i) => Volatile.Read(ref _leftOut[i])).Select(row => row.Place)];

    /// <summary>
    /// A bad row that was found since the rows were opened and must not be left out.
    /// </summary>
    public BadRow? Failure => Volatile.Read(ref _failure);

    /// <summary>Rows that the file itself rules out.</summary>
    public IReadOnlyList<BadRow> Unreadable => _set.Bad;

    /// <summary>Reads a data file without checking its rows.</summary>
    /// <param name="rest">The rows that training has of the same files, where these are a share.
    /// </param>
    /// <exception cref="InputException">
    /// The file cannot be used, or llm_type is another model's.
    /// </exception>
    public static DataRows Read(
        DataSources sources, TrainArguments arguments, RowFormat format, DataRows? rest = null) =>
        new(sources, arguments, format, null, rest: rest);

    /// <summary>
    /// The row with this id, or else with this number (counted from 1); -1 if there is none.
    /// </summary>
    public int Find(string id)
    {
        for (int i = 0; i < Count; i++)
            if (_rows[i].Id == id) return i;
        return int.TryParse(id, out int number)
            ? _rows.Index().FirstOrDefault(r => r.Item.Place == number, (-1, null!)).Index
            : -1;
    }

    public Row this[int row] => _rows[row];

    /// <summary>What a row that was checked brings to the device.</summary>
    public RowSize Size(int row) => _sizes.GetValueOrDefault(_rows[row].Place);

    /// <summary>A row's tokens, labels and bounds.</summary>
    /// <exception cref="BadRowException">The row cannot be trained on.</exception>
    public Sample Sample(int row) =>
        Build(_rows[row], Plans(_rows[row], out _), Lengths(_rows[row]));

    /// <inheritdoc/>
    public void Append(int row, Batch batch) => Append(_rows[row], batch, decode: true);

    /// <summary>As Append, without decoding pictures: the pixels are undefined.</summary>
    public void Outline(int row, Batch batch) => Append(_rows[row], batch, decode: false);

    private void Append(Row row, Batch batch, bool decode)
    {
        SlicePlan[] plans = Plans(row, out PictureInfo[] pictures);
        int[] lengths = Lengths(row);
        Sample sample = Build(row, plans, lengths);
        int start = batch.Tokens.Count, firstView = batch.Grids.Count / 2;
        for (int t = 0; t < sample.Labels.Length; t++)
        {
            if (sample.Labels[t] == PromptFormat.Ignored) continue;
            batch.LabelRows.Add(start + t);
            batch.Targets.Add(sample.Labels[t]);
        }

        Show(row, sample.InputIds, sample.Bounds, sample.Pictures, plans, pictures, batch, decode);
        AddSounds(
            row, sample.SoundBounds, lengths, batch, 0, sample.InputIds.Length, decode);
        if (batch.Grids.Count / 2 < firstView + sample.Bounds.Length)
            throw row.Bad("its text has more places for pictures than there are views");
    }

    /// <summary>The prompt of a row's last answer.</summary>
    /// <exception cref="BadRowException">The row cannot be asked.</exception>
    public RowPrompt Prompt(int row)
    {
        Row asked = _rows[row];
        SlicePlan[] plans = Plans(asked, out PictureInfo[] pictures);
        int answer = asked.Answer;
        int[] lengths = Lengths(asked);
        Prompt prompt = _builder.BuildPrompt(asked, plans, answer, lengths);
        MustKnow(asked, Largest(prompt.InputIds));
        ImageBound[] places = Places(asked, prompt.Bounds, prompt.Pictures, plans);
        ImageBound[] heard = _format.Sounds?.Places(prompt.SoundBounds, lengths) ?? [];
        return new(prompt.InputIds.Length, [.. places, .. heard], (batch, from, to) =>
        {
            Show(asked, prompt.InputIds, prompt.Bounds, places, prompt.Pictures, plans, pictures,
                batch, from, to);
            AddSounds(asked, prompt.SoundBounds, lengths, batch, from, to, decode: true);
        });
    }

    private void Show(
        Row row, int[] ids, ImageBound[] bounds, int[] shown, SlicePlan[] plans,
        PictureInfo[] pictures, Batch batch, bool decode = true) => Show(
            row, ids, bounds, Places(row, bounds, shown, plans), shown, plans, pictures, batch, 0,
            ids.Length, decode);

    // The tokens from..to and the pictures among them, of which none is cut.
    private void Show(Row row, int[] ids, ImageBound[] bounds, ImageBound[] places, int[] shown,
        SlicePlan[] plans, PictureInfo[] pictures, Batch batch, int from, int to,
        bool decode = true)
    {
        batch.AddRow(ids.AsSpan(0, to),
            to == ids.Length ? bounds : [.. bounds.Where(bound => bound.End <= to)], from,
            _format.Places(ids, shown.Select(picture => plans[picture]))?[..to]);
        foreach (var (i, picture) in shown.Index())
            if (places[i].Start >= from && places[i].End <= to)
                AppendPicture(row, picture, plans, pictures, decode, batch);
    }

    // The tokens that the views of each picture take, from the first one's to the last one's.
    private ImageBound[] Places(
        Row row, ImageBound[] bounds, int[] shown, SlicePlan[] plans)
    {
        var places = new ImageBound[shown.Length];
        int place = 0;
        for (int i = 0; i < shown.Length; i++)
        {
            SlicePlan plan = plans[shown[i]];
            for (int view = 0; view < plan.Views && place < bounds.Length; view++)
            {
                ImageBound bound = bounds[place++];
                int features = _format.Placeholders.Features(plan, view);
                if (bound.End - bound.Start != features)
                    throw row.Bad($"a picture's place has {bound.End - bound.Start} tokens, "
                        + $"expected {features}");
                places[i] = new(view == 0 ? bound.Start : places[i].Start, bound.End);
            }
        }

        return places;
    }

    private Sample Build(Row row, SlicePlan[] plans, int[] lengths)
    {
        Sample sample = _builder.Build(row, plans, lengths);
        MustKnow(row, Math.Max(Largest(sample.InputIds), Largest(sample.Labels)));
        return sample;
    }

    private static int Largest(int[] ids) => ids.Length == 0 ? -1 : ids.Max();

    private void MustKnow(Row row, int id)
    {
        if (id >= _format.Vocabulary)
            throw row.Bad($"the tokenizer gives it the token id {id}, the model has "
                + $"{_format.Vocabulary:N0} (vocab_size in config.json): they do not belong "
                + "together");
    }

    // A picture, or frames that are joined.
    private void AppendPicture(Row row, int index, SlicePlan[] plans, PictureInfo[] pictures,
        bool decode, Batch batch)
    {
        int features = _format.Placeholders.Features(plans[index]);
        if (row.Pictures[index].Times is { } times)
        {
            if (!batch.TryAddFrames(_frameStrips.Value!, decode
                ? frame => Decode(row, index + frame, Turn(pictures[index + frame])) : null,
                plans.AsSpan(index, times.Count), times, features))
                throw row.Bad($"{times.Count} frames that are joined have too many patches");
            return;
        }

        using Picture? picture = decode ? Decode(row, index, Turn(pictures[index])) : null;
        if (!batch.TryAddPicture(Strips(row, index), picture, plans[index], features))
            throw row.Bad($"picture \"{row.Pictures[index].Path}\" has too many patches");
    }

    private PatchStrips Strips(Row row, int picture) =>
        picture < row.Stills ? _strips.Value! : _frameStrips.Value!;

    /// <summary>A row's picture as it is stored.</summary>
    /// <exception cref="BadRowException">The picture cannot be decoded.</exception>
    internal static Picture Decode(Row row, int index, bool overWhite = false)
    {
        RowPicture named = row.Pictures[index];
        if (named.Beside.Count == 0) return Decode(row, named, overWhite);
        RowPicture[] frames = [.. named.Each];
        return FrameMosaic.Join(row, [.. frames.Select(frame => Probe(row, frame).Size)],
            i => Decode(row, frames[i], overWhite));
    }

    private static Picture Decode(Row row, RowPicture named, bool overWhite)
    {
        string path = named.Bytes is null ? row.Locate(named) : named.Path;
        try
        {
            return named.Bytes is { } bytes
                ? PictureDecoder.Decode(bytes, path, overWhite)
                : PictureDecoder.Decode(path, overWhite);
        }
        catch (InputException failure)
        {
            throw row.Bad(failure.Message);
        }
        catch (Exception failure) when (failure is IOException or InvalidDataException)
        {
            throw row.Bad($"{path}: cannot be decoded: {Messages.OneLine(failure.Message)}");
        }
    }

    private Picture Decode(Row row, int index, int orientation)
    {
        Picture picture = Decode(row, index, _format.OverWhite);
        if (orientation == 1) return picture;
        using (picture) return picture.Oriented(orientation);
    }

    private SlicePlan[] Plans(Row row, out PictureInfo[] pictures)
    {
        if (row.Fault is { } fault) throw row.Bad(fault);
        var plans = new SlicePlan[row.Pictures.Count];
        pictures = new PictureInfo[plans.Length];
        for (int i = 0; i < plans.Length; i++)
        {
            pictures[i] = Probe(row, i);
            // Orientations 5 to 8 turn the picture on its side.
            PictureSize size = pictures[i].Size;
            if (Turn(pictures[i]) >= 5) size = new(size.Height, size.Width);
            plans[i] = i < row.Stills ? Plan(row, i, size, Turn(pictures[i]))
                : _frameSlicing.Plan(size);
        }

        foreach (RowVideo video in row.Videos)
            foreach (int group in video.Shown(row)) MustBeCutAlike(row, group, plans);
        return plans;
    }

    internal static void MustBeCutAlike(Row row, int first, SlicePlan[] plans)
    {
        int count = row.Pictures[first].Times?.Count ?? 1;
        SlicePlan plan = plans[first];
        for (int i = first + 1; i < first + count; i++)
            if ((plans[i].Columns, plans[i].Rows) != (plan.Columns, plan.Rows))
                throw row.Bad($"frames {Messages.Quote(row.Pictures[first].Path)} and "
                    + $"{Messages.Quote(row.Pictures[i].Path)} are joined, but cut into different "
                    + "numbers of tiles: give them one size, or set video_max_slice_nums to 1");
    }

    // What pixels decide is decided once.
    private SlicePlan Plan(Row row, int index, PictureSize size, int orientation) =>
        _slicing.Small != SmallPictures.Adaptive
            ? _slicing.Plan(size, () => Decode(row, index, orientation))
            : _plans.GetOrAdd((row.Place, index),
                _ => _slicing.Plan(size, () => Decode(row, index, orientation)));

    /// <summary>The EXIF orientation that is applied; 1 changes nothing.</summary>
    private int Turn(PictureInfo picture) => _orient ? picture.Orientation : 1;

    internal static PictureInfo Probe(Row row, int index)
    {
        RowPicture named = row.Pictures[index];
        PictureInfo first = Probe(row, named);
        return named.Beside.Count == 0 ? first : first with
        {
            Size = FrameMosaic.Of(
                row, [first.Size, .. named.Beside.Select(frame => Probe(row, frame).Size)]).Size,
            Orientation = 1,
        };
    }

    private static PictureInfo Probe(Row row, RowPicture named)
    {
        try
        {
            return named.Bytes is { } bytes ? PictureDecoder.Probe(bytes, named.Path)
                : PictureDecoder.Probe(row.Locate(named));
        }
        catch (InputException failure)
        {
            throw row.Bad(failure.Message);
        }
    }
}
