using System.Collections.Concurrent;
using MiniCpmNative.Engine.Data.Audio;

namespace MiniCpmNative.Engine.Data;

/// <summary>Sounds of rows: read anew whenever a row is made, their lengths known from then
/// on.</summary>
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
                    + $"{Messages.Number(lengths[i])} samples at {SoundReader.Rate:N0} Hz, which "
                    + "is too short to be heard");
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

    private void AddSounds(Row row, ImageBound[] bounds, int[] lengths, Batch batch, int from,
        int to, bool decode)
    {
        if (lengths.Length > 0)
            _format.Sounds!.Add(batch, bounds, lengths, from, to, decode ? Known : null);

        float[] Known(int sound)
        {
            float[] samples = Samples(row, sound);
            return samples.Length == lengths[sound] ? samples : throw row.Bad(
                $"sound {Messages.Quote(row.Sounds[sound].Path)} was changed: it had "
                + $"{Messages.Number(lengths[sound])} samples, it has "
                + Messages.Number(samples.Length));
        }
    }
}
