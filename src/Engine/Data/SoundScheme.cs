using MiniCpmNative.Engine.Data.Audio;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// The text that stands for a sound, where it lies in the tokens, and its features: a place is
/// &lt;|audio_start|&gt;unk*n&lt;|audio_end|&gt;, one for the whole sound, or one for each second.
/// What is longer than a clip (30 s of the released models) is heard in clips.
/// </summary>
public sealed class SoundScheme
{
    private const string Start = "<|audio_start|>", End = "<|audio_end|>";
    private const int SamplesOfAFrame = 160;

    private readonly string _unknown;
    private readonly Func<int, int> _tokens;
    private readonly int _bands, _clip, _tokensOfAPlace, _start, _end;
    private readonly Lazy<LogMel> _features;

    /// <param name="tokenizer">Has the tokens around a sound.</param>
    /// <param name="unknown">The token that holds a feature's place.</param>
    /// <param name="bands">num_mel_bins.</param>
    /// <param name="clipFrames">Frames of a clip, at most.</param>
    /// <param name="tokens">Features of a clip of so many frames.</param>
    /// <param name="tokensOfAPlace">Features of a place, at most.</param>
    /// <param name="place">Where the tokenizer is, for messages.</param>
    /// <exception cref="InputException">The tokenizer lacks one of the tokens.</exception>
    public SoundScheme(Tokenizer tokenizer, string unknown, int bands, int clipFrames,
        Func<int, int> tokens, int tokensOfAPlace, string place)
    {
        (_unknown, _bands, _tokens, _tokensOfAPlace) = (unknown, bands, tokens, tokensOfAPlace);
        _clip = Math.Min(clipFrames * SamplesOfAFrame, LogMel.MostSamples);
        (_start, _end) = (tokenizer.Require(Start, place), tokenizer.Require(End, place));
        _features = new Lazy<LogMel>(() => new LogMel(bands));
    }

    /// <summary>Samples a second.</summary>
    public const int Rate = SoundReader.Rate;

    /// <summary>The samples of a file.</summary>
    /// <exception cref="InputException">It cannot be read.</exception>
    public static float[] Read(string path) => SoundReader.Read(path);

    /// <summary>The same of a file's content; name stands in messages.</summary>
    /// <inheritdoc cref="Read(string)"/>
    public static float[] Read(byte[] content, string name) => SoundReader.Read(content, name);

    /// <summary>A text that holds one would be read as a sound.</summary>
    public static IReadOnlyList<string> Markers { get; } = [Start, End];

    /// <summary>Features of a sound.</summary>
    public int Tokens(int samples)
    {
        int tokens = 0;
        for (int from = 0; from < samples; from += _clip)
            tokens += _tokens(LogMel.Frames(Math.Min(_clip, samples - from)));
        return tokens;
    }

    /// <summary>Frames of a sound.</summary>
    public static int Frames(int samples) => LogMel.Frames(samples);

    /// <summary>A sound's text.</summary>
    public string Text(int samples)
    {
        var text = new System.Text.StringBuilder();
        for (int left = Tokens(samples); left > 0; left -= _tokensOfAPlace)
            text.Append(Start)
                .Insert(text.Length, _unknown, Math.Min(left, _tokensOfAPlace)).Append(End);
        return text.ToString();
    }

    /// <summary>The places in ids; null when starts and ends do not pair up.</summary>
    public ImageBound[]? Bounds(ReadOnlySpan<int> ids)
    {
        var bounds = new List<ImageBound>();
        int start = -1;
        for (int i = 0; i < ids.Length; i++)
        {
            if (ids[i] != _start && ids[i] != _end) continue;
            if (ids[i] == _start == start >= 0) return null;
            if (start >= 0) bounds.Add(new(start, i));
            start = start < 0 ? i + 1 : -1;
        }

        return start < 0 ? [.. bounds] : null;
    }

    /// <summary>The tokens that the places of each sound take, from the first one's to the last
    /// one's.</summary>
    /// <param name="bounds">All places.</param>
    /// <param name="lengths">Samples of each sound.</param>
    public ImageBound[] Places(ImageBound[] bounds, IReadOnlyList<int> lengths)
    {
        var places = new List<ImageBound>();
        for (int next = 0; next < bounds.Length;)
        {
            int first = bounds[next].Start, left = Tokens(lengths[places.Count]);
            for (; left > 0; next++) left -= bounds[next].End - bounds[next].Start;
            places.Add(new(first, bounds[next - 1].End));
        }

        return [.. places];
    }

    /// <summary>
    /// Adds the sounds among the tokens from..to of the row that came last, of which none is cut.
    /// </summary>
    /// <param name="batch">Takes them.</param>
    /// <param name="bounds">All places of the row.</param>
    /// <param name="lengths">Samples of each sound.</param>
    /// <param name="from">The first token that was added.</param>
    /// <param name="to">Behind the last.</param>
    /// <param name="samples">Those of a sound; null leaves features undefined.</param>
    public void Add(Batch batch, ImageBound[] bounds, IReadOnlyList<int> lengths, int from, int to,
        Func<int, float[]>? samples)
    {
        batch.AddSoundSlots(
            [.. bounds.Where(bound => bound.Start >= from && bound.End <= to)], from);
        foreach (var (i, place) in Places(bounds, lengths).Index())
            if (place.Start >= from && place.End <= to)
                Append(batch, samples is null ? [] : samples(i), lengths[i]);
    }

    private void Append(Batch batch, ReadOnlySpan<float> samples, int length)
    {
        for (int from = 0; from < length; from += _clip)
        {
            int count = Math.Min(_clip, length - from), frames = LogMel.Frames(count);
            if (_tokens(frames) == 0) continue;
            Span<float> into = batch.AddClip(frames, _bands);
            if (samples.IsEmpty) continue;
            float[] features = _features.Value.Run(samples.Slice(from, count));
            for (int t = 0; t < frames; t++)
                for (int band = 0; band < _bands; band++)
                    into[(t * _bands) + band] = features[(band * frames) + t];
        }
    }
}
