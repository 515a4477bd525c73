using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;
using static MiniCpmNative.Engine.Data.RowValues;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Turns that are made of parts, as OpenAI and transformers have them: their text, and what the
/// parts show.
/// </summary>
internal sealed class RowParts
{
    // Where transformers has what a part shows.
    private static readonly string[] s_shownParts = ["image", "video", "url", "path", "base64"];

    private static readonly string[] s_soundParts = ["audio", "url", "path", "base64"];

    public List<RowPicture> Pictures { get; } = [];

    public List<RowVideo> Videos { get; } = [];

    public List<RowPicture> Sounds { get; } = [];

    /// <summary>The text of a turn's parts, a tag where one shows something.</summary>
    /// <exception cref="FormatException">A part is of another type, or broken.</exception>
    public string Text(JsonElement parts)
    {
        // Parts stand behind each other without anything between, as ms-swift has them.
        var joined = new StringBuilder();
        foreach (var part in parts.EnumerateArray())
        {
            string? type = part.Member("type").Text();
            switch (type)
            {
                case "text":
                    joined.Append(TextOf(part, "text"));
                    break;
                case "image_url" or "image":
                    var value = Shown(part, type, s_shownParts);
                    // A part without its picture shows the next of the row's.
                    if (!value.IsNull()) Pictures.Add(RowPictures.One(value));
                    joined.Append("<image>");
                    break;
                case "audio_url" or "audio" or "input_audio":
                    if (Sound(part, type) is { } sound) Sounds.Add(sound);
                    joined.Append(SoundText.Tag);
                    break;
                case "video_url" or "video":
                    var video = Shown(part, type, s_shownParts);
                    if (!video.IsNull())
                        Videos.Add(RowVideo.Of(video, part.Member("fps")));
                    joined.Append(RowVideo.Tag);
                    break;
                default:
                    throw new FormatException("has a part of type "
                        + (type is null ? Kind(part.Member("type")) : Messages.Quote(type))
                        + ", expected \"text\", \"image_url\", \"video_url\" or \"audio_url\"");
            }
        }

        return joined.ToString();
    }

    // A part without its sound is heard with the next of the row's. OpenAI's has base64 in "data".
    private static RowPicture? Sound(JsonElement part, string type)
    {
        if (Value(part, type, s_soundParts) is { ValueKind: JsonValueKind.Object } stored
            && stored.Member("data").Text() is { } base64)
            return RowPictures.Embedded(RowPictures.Decoded(base64, "sound"), SoundText.Tag);
        var value = Shown(part, type, s_soundParts);
        return value.IsNull() ? null : RowPictures.One(value, SoundText.Tag);
    }

    // What a part shows, under its type or another of the keys.
    private static JsonElement Shown(JsonElement part, string type, string[] keys)
    {
        var value = Value(part, type, keys);
        return value.ValueKind == JsonValueKind.Object && value.TryGetProperty("url", out var url)
            ? url : value;
    }

    private static JsonElement Value(JsonElement part, string type, string[] keys)
    {
        var value = part.Member(type);
        foreach (string key in keys)
            if (value.IsNull()) value = part.Member(key);
        return value;
    }
}
