using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Cli.Serve;

/// <summary>
/// Pictures, videos and sounds of a request, as far as their content comes with it: nothing is
/// fetched.
/// </summary>
internal sealed class RequestMedia
{
    private const int MostPictures = 64, MostVideos = 4, MostFrames = 1024, MostSounds = 16;

    // Frames of a video in one data: URL, divided by commas.
    private const string Joined = "data:video/jpeg";

    private readonly List<byte[]> _pictures = [], _sounds = [];
    private readonly List<RowVideo> _videos = [];
    private int _frames;

    /// <summary>The content of the pictures that parts point to.</summary>
    public IReadOnlyList<byte[]> Pictures => _pictures;

    /// <summary>The videos that parts point to: frames, or the content of a file.</summary>
    public IReadOnlyList<RowVideo> Videos => _videos;

    /// <summary>The content of the sounds, whose parts are in their order.</summary>
    public IReadOnlyList<byte[]> Sounds => _sounds;

    /// <summary>Takes a part of a turn; null where it is none of these.</summary>
    /// <exception cref="InputException">It is damaged, or one too many.</exception>
    public PromptPart? Take(JsonValue part)
    {
        string type = part["type"].Text();
        switch (type)
        {
            case "image_url":
                if (_pictures.Count == MostPictures)
                    throw part.Error($"is picture {MostPictures + 1}, at most "
                        + $"{MostPictures} are shown");
                JsonValue url = part[type];
                _pictures.Add(Content(url.IsText ? url : url["url"]));
                return _pictures.Count - 1;
            case "video_url":
                if (_videos.Count == MostVideos)
                    throw part.Error(
                        $"is video {MostVideos + 1}, at most {MostVideos} are shown");
                _videos.Add(Video(part[type]));
                return new PromptPart(null, -1, Video: _videos.Count - 1);
            case "input_audio" or "audio_url":
                if (_sounds.Count == MostSounds)
                    throw part.Error($"is sound {MostSounds + 1}, at most {MostSounds} are heard");
                JsonValue sound = part[type];
                _sounds.Add(sound.IsText ? Content(sound)
                    : sound.Find("data") is { } data ? Decoded(data, data.Text())
                    : Content(sound["url"]));
                return new PromptPart(null, -1, _sounds.Count - 1);
            default:
                return null;
        }
    }

    private RowVideo Video(JsonValue video)
    {
        JsonValue url = video.IsObject ? video["url"] : video;
        double? fps = video.IsObject ? video.Find("fps")?.Number(1e-3, 1000) : null;
        string name = $"video {_videos.Count + 1}";
        if (!url.IsText) return Of([.. url.Items().Select(Content)]);
        string text = url.Text();
        return !text.StartsWith(Joined, StringComparison.OrdinalIgnoreCase)
            ? new RowVideo { Bytes = Content(url), Path = name, Fps = fps }
            : Of([.. text[(Comma(url, text) + 1)..].Split(',').Select(
                frame => Decoded(url, frame))]);

        RowVideo Of(byte[][] frames)
        {
            _frames += frames.Length;
            if (frames.Length == 0) throw url.Error("has no frames");
            if (_frames > MostFrames)
                throw url.Error($"has frames beyond {MostFrames}, at most so many may come");
            return new RowVideo
            {
                Fps = fps,
                Frames = [.. frames.Select((frame, i) =>
                    new RowPicture(RowVideo.Tag, $"{name}, frame {i + 1}") { Bytes = frame })],
            };
        }
    }

    private static byte[] Content(JsonValue url)
    {
        string text = url.Text();
        return Decoded(url, text.AsSpan(Comma(url, text) + 1));
    }

    private static int Comma(JsonValue url, string text)
    {
        int comma = text.IndexOf(',');
        return text.StartsWith("data:", StringComparison.OrdinalIgnoreCase) && comma >= 0
            && text.AsSpan(0, comma).EndsWith(";base64", StringComparison.OrdinalIgnoreCase)
            ? comma : throw url.Error(
                "is no data: URL in base64 (data:image/png;base64,...): nothing is fetched");
    }

    private static byte[] Decoded(JsonValue value, ReadOnlySpan<char> base64)
    {
        var bytes = new byte[(base64.Length / 4 * 3) + 3];
        return Convert.TryFromBase64Chars(base64, bytes, out int length)
            ? bytes[..length] : throw value.Error("is not base64");
    }
}
