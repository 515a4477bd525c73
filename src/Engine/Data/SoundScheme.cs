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

    /// <summary>Adds a sound's clips; without samples their content is undefined.</summary>
    public void Append(Batch batch, ReadOnlySpan<float> samples, int length)
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
