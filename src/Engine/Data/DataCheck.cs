using System.Globalization;
using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// `cpmx data check`: reads every row of the training and evaluation data and decodes its pictures,
/// names each bad row, and shows what training would see.
/// </summary>
public static class DataCheck
{
    /// <summary>Writes the report; false when a row is bad.</summary>
    /// <exception cref="InputException">A file cannot be read at all.</exception>
    public static bool Run(TrainArguments arguments, RowFormat format, TextWriter output)
    {
        DataRows training = DataRows.Read(arguments.TrainingData, arguments, format);
        bool good = Run(training, arguments, format, output);
        return arguments.EvaluationData is not { } evaluation ? good : good
            & Run(DataRows.Read(evaluation, arguments, format, training), arguments, format,
                output);
    }

    private static bool Run(DataRows rows, TrainArguments arguments, RowFormat format,
        TextWriter output)
    {
        string path = rows.Path;
        foreach (string file in rows.OtherFormats) output.WriteLine(file);
        RowCheck[] checks = rows.Check(decode: true);
        var bad = rows.Bad(checks);
        foreach (BadRow row in bad) output.WriteLine(row);
        var usable = checks.Where(c => c.Bad is null).ToList();
        output.WriteLine(
            $"{path}: {Number(rows.Count + rows.Unreadable.Count)} rows, {Number(bad.Count)} bad");
        if (usable.Count == 0) return false;

        int[] lengths = [.. usable.Select(c => c.Tokens).Order()];
        output.WriteLine($"  tokens per row: least {Number(lengths[0])}, median "
            + $"{Number(lengths[lengths.Length / 2])}, 95 % at most "
            + $"{Number(lengths[(int)(0.95 * (lengths.Length - 1))])}, most {Number(lengths[^1])}; "
            + $"all {Number(usable.Sum(c => (long)c.Tokens))}");
        output.WriteLine($"  supervised tokens: {Number(usable.Sum(c => (long)c.Supervised))}");
        var counts = RowCounts.Of(
            checks, rows.Unreadable.Count, arguments.ApplyExifOrientation,
            arguments.ModelMaxLength);
        output.WriteLine(
            $"  longer than model_max_length {Number(arguments.ModelMaxLength)}, would be cut: "
            + $"{Number(counts.Cut)}; answers that would lose their end: "
            + Number(counts.AnswersCut));
        output.WriteLine(
            $"  pictures: {Number(counts.Pictures)}, {Number(counts.Turned)} {counts.TurnedText}");
        if (usable.Sum(c => c.Sounds) is > 0 and var sounds)
            output.WriteLine($"  sounds: {Number(sounds)}");
        Row[] moving = [.. Enumerable.Range(0, rows.Count).Where(i => checks[i].Bad is null
            && rows[i].Videos.Count > 0).Select(i => rows[i])];
        if (moving.Length > 0)
            output.WriteLine($"  videos: {Number(moving.Sum(row => row.Videos.Count))}, of whose "
                + $"frames {Number(moving.Sum(row => row.Pictures.Count - row.Stills))} are taken, "
                + "as pictures");
        var kinds = usable.SelectMany(c => c.Kinds ?? []).CountBy(k => k)
            .OrderByDescending(k => k.Value).ThenBy(k => k.Key, StringComparer.Ordinal)
            .Select(k => $"{Number(k.Value)} {k.Key}").ToList();
        if (kinds.Count > 0) output.WriteLine("  kinds of pictures: " + string.Join(", ", kinds));
        if (DataRows.JpegFallback(checks) is { } fallback) output.WriteLine("  " + fallback);
        Show(rows, Array.FindIndex(checks, c => c.Bad is null), output);
        return bad.Count == 0;
    }

    /// <summary>
    /// One row as the model sees it: the text, and under it what is to be predicted.
    /// </summary>
    private static void Show(DataRows rows, int index, TextWriter output)
    {
        Sample sample = rows.Sample(index);
        output.WriteLine(
            $"  row {rows[index].Number} as the model sees it, supervised text in [[ ]]:");
        PlaceholderScheme places = rows.Format.Placeholders;
        var text = new System.Text.StringBuilder();
        var run = new List<int>();
        bool supervised = false, heard = false;
        int folded = 0;
        for (int t = 0; t < sample.InputIds.Length; t++)
        {
            // labels[t] is what follows token t: token t itself is supervised if label t - 1 is.
            bool answer = t > 0 && sample.Labels[t - 1] == sample.InputIds[t];
            bool fold = sample.InputIds[t] == places.UnknownId
                || sample.InputIds[t] == places.VideoId;
            if (answer != supervised || fold != (folded > 0)) Flush();
            (supervised, heard) = (answer, sample.SoundBounds.Any(b => t >= b.Start && t < b.End));
            if (fold) folded++;
            else run.Add(sample.InputIds[t]);
        }

        Flush();
        foreach (string line in text.ToString().Split('\n'))
            output.WriteLine("    " + Messages.Visible(line));

        void Flush()
        {
            if (folded > 0)
                text.Append(CultureInfo.InvariantCulture,
                    $"({folded} {(heard ? "sound" : "picture")} features)");
            if (run.Count > 0)
            {
                string decoded = rows.Format.Tokenizer.Decode(run.ToArray());
                text.Append(supervised ? $"[[{decoded}]]" : decoded);
            }

            run.Clear();
            folded = 0;
        }
    }

    private static string Number(long value) => value.ToString("N0", CultureInfo.InvariantCulture);
}
