using System.Buffers;
using System.Buffers.Text;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Pictures and sounds as rows name them: a path, a data: URI or plain base64, {"bytes", "path"}.
/// Addresses on the network are refused: a run that loads them as it goes is not repeatable.
/// </summary>
internal static class RowPictures
{
    // What base64 of a JPEG, PNG, GIF, WebP or BMP begins with; no path does at such a length.
    private static readonly string[] s_base64 = ["/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk"];
    private const int LeastBase64 = 128;

    /// <summary>"image" of the official format.</summary>
    public static (PictureNames, RowPicture[]) Official(JsonElement image)
    {
        switch (image.ValueKind)
        {
            case JsonValueKind.Null or JsonValueKind.Undefined:
                return (PictureNames.None, []);
            case JsonValueKind.String:
                return (PictureNames.Single, [One(image)]);
            case JsonValueKind.Array:
                return (PictureNames.Listed, [.. image.EnumerateArray().Select(item => One(item))]);
            case JsonValueKind.Object when !IsStored(image):
                var tagged = image.EnumerateObject()
                    .Select(item => One(item.Value, item.Name)).ToArray();
                return (tagged is [{ Tag: "<image>" }] ? PictureNames.Single : PictureNames.Tagged,
                    tagged);
            case JsonValueKind.Object:
                return (PictureNames.Single, [One(image)]);
            default:
                throw new FormatException(
                    $"\"image\" is {RowValues.Kind(image)}, expected a path, a list of paths "
                    + "or {\"<image_00>\": path, ...}");
        }
    }

    /// <summary>The sounds of a row, of whatever format.</summary>
    public static RowPicture[] Sounds(JsonElement row)
    {
        JsonElement audio = row.Member("audio"), audios = row.Member("audios");
        if (!audio.SaysNothing() && !audios.SaysNothing())
            throw new FormatException("has sounds under both \"audio\" and \"audios\"");
        return [.. Listed(audio.SaysNothing() ? audios : audio, SoundText.Tag)];
    }

    /// <summary>Pictures of other formats, or sounds: one, or a list of them.</summary>
    public static IEnumerable<RowPicture> Listed(JsonElement images, string tag = "<image>")
    {
        images = RowValues.Unfolded(images);
        if (images.SaysNothing()) return [];
        return images.ValueKind == JsonValueKind.Array
            ? images.EnumerateArray().Select(item => One(item, tag)) : [One(images, tag)];
    }

    /// <summary>One picture, or sound.</summary>
    public static RowPicture One(JsonElement value, string tag = "<image>")
    {
        string what = RowPicture.KindOf(tag);
        if (value.ValueKind == JsonValueKind.Object && IsStored(value)) return Stored(value, tag);
        if (Direct(value) is { } content) return Embedded(content, tag);
        if (value.Text() is not { Length: > 0 } path)
            throw new FormatException(
                $"a {what}'s path is {RowValues.Kind(value)}, expected text");
        if (path.StartsWith("data:", StringComparison.OrdinalIgnoreCase))
            return Embedded(Content(path, what), tag);
        if (path.Length >= LeastBase64
            && s_base64.Any(start => path.StartsWith(start, StringComparison.Ordinal))
            && Base64.IsValid(path))
            return Embedded(Convert.FromBase64String(path), tag);
        int scheme = path.AsSpan(0, Math.Min(path.Length, 12)).IndexOf("://");
        if (scheme < 0) return new RowPicture(tag, path);
        if (path.StartsWith("file://", StringComparison.OrdinalIgnoreCase))
            return new RowPicture(tag, path["file://".Length..]);
        throw new FormatException($"{what} {Messages.Quote(path)} is an address on the network: "
            + "download it, and name the file");
    }

    // Base64 as it lies in the file, without the text that a string of it would be.
    private static byte[]? Direct(JsonElement value)
    {
        if (value.ValueKind != JsonValueKind.String) return null;
        var text = JsonMarshal.GetRawUtf8Value(value)[1..^1];
        if (text.Length < LeastBase64 || text.Contains((byte)'\\')) return null;
        if (text.StartsWith("data:image/"u8))
        {
            int comma = text.IndexOf((byte)',');
            if (comma is < 0 or > 200 || !text[..comma].EndsWith(";base64"u8)) return null;
            text = text[(comma + 1)..];
        }
        else if (!IsBase64Start(text)) return null;

        var bytes = new byte[Base64.GetMaxDecodedFromUtf8Length(text.Length)];
        if (Base64.DecodeFromUtf8(text, bytes, out _, out int written) != OperationStatus.Done)
            return null;
        Array.Resize(ref bytes, written);
        return bytes;
    }

    private static bool IsBase64Start(ReadOnlySpan<byte> text)
    {
        foreach (string start in s_base64)
            if (text.StartsWith(Encoding.ASCII.GetBytes(start))) return true;
        return false;
    }

    private static bool IsStored(JsonElement value) =>
        value.TryGetProperty("bytes", out _) || value.TryGetProperty("path", out _);

    // The bytes go first: the path is where they came from.
    private static RowPicture Stored(JsonElement value, string tag)
    {
        var bytes = value.Member("bytes");
        if (bytes.SaysNothing()) return One(value.Member("path"), tag);
        return bytes.ValueKind == JsonValueKind.String
            && bytes.TryGetBytesFromBase64(out byte[]? content)
            ? Embedded(content, tag)
            : throw new FormatException(
                $"a {RowPicture.KindOf(tag)}'s \"bytes\" are {RowValues.Kind(bytes)}, expected "
                    + "base64");
    }

    private static byte[] Content(string uri, string what)
    {
        int comma = uri.IndexOf(',');
        string head = comma < 0 ? uri : uri[..comma];
        if (head.Length > 200) head = head[..200];
        string kind = head["data:".Length..].Split(';')[0];
        if (kind.StartsWith("video/", StringComparison.OrdinalIgnoreCase)
            || kind.StartsWith(what == "sound" ? "image/" : "audio/",
                StringComparison.OrdinalIgnoreCase))
            throw new FormatException($"is given {Messages.Quote(kind)} as a {what}");
        if (comma < 0 || !head.EndsWith(";base64", StringComparison.OrdinalIgnoreCase))
            throw new FormatException(
                $"{what} {Messages.Quote(head)} is no data: URI of base64");
        return Decoded(uri[(comma + 1)..], $"{what} {Messages.Quote(head)}");
    }

    /// <summary>Bytes of base64.</summary>
    public static byte[] Decoded(string base64, string what)
    {
        try
        {
            return Convert.FromBase64String(base64);
        }
        catch (FormatException)
        {
            throw new FormatException($"{what}: its data is not base64");
        }
    }

    /// <summary>One that the row holds; its name tells contents apart, as a path does.</summary>
    public static RowPicture Embedded(byte[] content, string tag) => new(tag,
        $"embedded {RowPicture.KindOf(tag)} "
        + $"{Convert.ToHexStringLower(SHA256.HashData(content).AsSpan(0, 6))} "
        + $"of {Messages.Number(content.Length)} bytes")
    {
        Bytes = content,
    };
}
