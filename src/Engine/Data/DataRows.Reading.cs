using System.Security.Cryptography;
using System.Text;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Data;

/// <summary>From files to rows: several of them one behind the other, a share, boxes.</summary>
public sealed partial class DataRows
{
    /// <summary>All rows of some files, of which shares are taken.</summary>
    private sealed record WholeSet(
        DataSources Of, RowSet Set, string Digest, IReadOnlyList<string> Formats);

    internal static (RowSet Set, string Digest, IReadOnlyList<string> Formats) ReadSet(
        DataSources sources, RowOptions options, BoxFormat boxes) =>
        Shared(sources, Read(sources, options), boxes);

    private static (RowSet Set, string Digest, IReadOnlyList<string> Formats) Shared(
        DataSources sources, WholeSet whole, BoxFormat boxes)
    {
        List<Row> rows = [.. whole.Set.Rows];
        List<BadRow> bad = [.. whole.Set.Bad];
        if (sources.Share is { } share) Keep(share, rows, bad, $"{sources}");
        Fill(rows, bad, boxes);
        return (new RowSet(rows, bad), whole.Digest, whole.Formats);
    }

    private static WholeSet Read(DataSources sources, RowOptions options)
    {
        var rows = new List<Row>();
        var bad = new List<BadRow>();
        var digests = new List<string>();
        var formats = new List<string>();
        int before = 0;
        foreach (var (path, columns) in DataFiles.Of(sources))
        {
            byte[] bytes = InputFile.ReadAll(path, Array.MaxLength);
            digests.Add(Convert.ToHexStringLower(SHA256.HashData(bytes)));
            RowSet set = RowFile.Parse(path, bytes, options, before, columns);
            if (set.Format is not null) formats.Add($"{path}: read as {set.Format}");
            rows.AddRange(set.Rows);
            bad.AddRange(set.Bad);
            before = Math.Max(
                rows.Count > 0 ? rows[^1].Place : 0, bad.Count > 0 ? bad[^1].Place : 0);
        }

        string digest = digests.Count == 1 ? digests[0] : Convert.ToHexStringLower(
            SHA256.HashData(Encoding.ASCII.GetBytes(string.Concat(digests))));
        return new WholeSet(sources with { Share = null }, new RowSet(rows, bad), digest, formats);
    }

    /// <summary>
    /// The rows of a share. All rows are drawn from, bad ones too: one that is repaired, or left
    /// out, moves no other to the other side.
    /// </summary>
    private static void Keep(RowShare share, List<Row> rows, List<BadRow> bad, string path)
    {
        int[] places =
            [.. rows.Select(row => row.Place).Concat(bad.Select(row => row.Place)).Order()];
        int kept = share.Kept < 1
            ? (int)Math.Ceiling(share.Kept * places.Length) : (int)share.Kept;
        if (kept >= places.Length)
            throw new InputException($"{path}: eval_split keeps {kept:N0} of {places.Length:N0} "
                + "rows: none is left to train on");
        var order = new Sampler(places.Length, places.Length, shuffle: true, (ulong)share.Seed);
        var evaluated = new HashSet<int>();
        foreach (int row in order.Batch(0, 0)[..kept]) evaluated.Add(places[row]);
        rows.RemoveAll(row => evaluated.Contains(row.Place) != share.Evaluates);
        bad.RemoveAll(row => evaluated.Contains(row.Place) != share.Evaluates);
    }

    // Frames become pictures here.
    private static RowSet ChooseFrames(RowSet set, VideoRules? rules)
    {
        if (set.Rows.All(row => row.Videos.Count == 0)) return set;
        var rows = new Row[set.Rows.Count];
        InParallel(rows.Length, i =>
        {
            try
            {
                rows[i] = VideoFrames.Choose(set.Rows[i], rules, VideoDecoder.Default);
            }
            catch (BadRowException failure)
            {
                // It keeps its place until rows are checked, as with a picture that is missing.
                rows[i] = set.Rows[i] with { Fault = failure.Row.Reason };
            }
        });
        return set with { Rows = rows };
    }

    // Boxes become text here, so that nothing behind knows of them.
    private static void Fill(List<Row> rows, List<BadRow> bad, BoxFormat boxes)
    {
        if (rows.TrueForAll(row => row.Objects is null)) return;
        var good = new List<Row>(rows.Count);
        foreach (Row row in rows)
        {
            try
            {
                // A picture's header is read once, however many boxes it has.
                var sizes = new PictureSize?[row.Pictures.Count];
                good.Add(row.Objects?.Fill(row, boxes,
                    picture => sizes[picture] ??= Probe(row, picture).Size) ?? row);
            }
            catch (BadRowException failure)
            {
                bad.Add(failure.Row);
            }
        }

        rows.Clear();
        rows.AddRange(good);
        bad.Sort((a, b) => a.Place.CompareTo(b.Place));
    }
}
