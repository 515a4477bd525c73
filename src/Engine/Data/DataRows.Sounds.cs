using System.Collections.Concurrent;
using MiniCpmNative.Engine.Data.Audio;

namespace MiniCpmNative.Engine.Data;

/// <summary>Sounds of rows: read anew whenever a row is made, their lengths known from then on.</summary>
public sealed partial class DataRows
{
    private readonly ConcurrentDictionary<(int Row, int Sound), int> _lengths = [];

    // Samples of each sound.
    private int[] Lengths(Row row)
    {
        if (row.Sounds.Count == 0) return [];
        if (_format.Sounds is not { } scheme)
            throw row.Bad("has audio, which the model does not hear in this run: init_audio=true "
                + "runs a model's audio encoder, if it has one");
        var lengths = new int[row.Sounds.Count];
        for (int i = 0; i < lengths.Length; i++)
        {
            lengths[i] = _lengths.GetOrAdd((row.Place, i), key => Samples(row, key.Sound).Length);
            if (scheme.Tokens(lengths[i]) == 0)
                throw row.Bad($"sound {Messages.Quote(row.Sounds[i].Path)} has "
                    + $"{Messages.Number(lengths[i])} samples at {SoundReader.Rate:N0} Hz, which is "
                    + "too short to be heard");
        }

        return lengths;
    }

    private static float[] Samples(Row row, int index)
    {
        RowPicture named = row.Sounds[index];
        try
        {
            return named.Bytes is { } bytes
                ? SoundReader.Read(bytes, named.Path) : SoundReader.Read(row.Locate(named));
        }
        catch (InputException failure)
        {
            throw row.Bad(failure.Message);
        }
    }

    // The tokens that the places of each sound take, from the first one's to the last one's.
    private ImageBound[] SoundPlaces(ImageBound[] bounds, int[] lengths)
    {
        var places = new List<ImageBound>();
        for (int next = 0; next < bounds.Length;)
        {
            int first = bounds[next].Start, left = _format.Sounds!.Tokens(lengths[places.Count]);
            for (; left > 0; next++) left -= bounds[next].End - bounds[next].Start;
            places.Add(new(first, bounds[next - 1].End));
        }

        return [.. places];
    }

    // The sounds among the tokens from..to, of which none is cut.
    private void AddSounds(Row row, ImageBound[] bounds, int[] lengths, Batch batch, int from,
        int to, bool decode)
    {
        if (bounds.Length == 0) return;
        batch.AddSoundSlots(
            [.. bounds.Where(bound => bound.Start >= from && bound.End <= to)], from);
        foreach (var (i, place) in SoundPlaces(bounds, lengths).Index())
        {
            if (place.Start < from || place.End > to) continue;
            float[] samples = decode ? Samples(row, i) : [];
            if (decode && samples.Length != lengths[i])
                throw row.Bad($"sound {Messages.Quote(row.Sounds[i].Path)} was changed: it had "
                    + $"{Messages.Number(lengths[i])} samples, it has {Messages.Number(samples.Length)}");
            _format.Sounds!.Append(batch, samples, lengths[i]);
        }
    }
}
