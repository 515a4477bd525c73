using System.IO.Compression;
using System.Security.Cryptography;
using System.Text.Json;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Tests;

/// <summary>
/// Reference pictures of tests/reference/images, made with Pillow and the official image
/// processors; CPMX_REFERENCE may name a folder with the full set.
/// </summary>
internal static class ImageReference
{
    public static string Folder { get; } = Path.Combine(
        Environment.GetEnvironmentVariable("CPMX_REFERENCE") is { Length: > 0 } full
            ? full : ReferenceFile.Root, "images");

    public static IEnumerable<JsonElement> Load(string name)
    {
        using var json = JsonDocument.Parse(File.ReadAllBytes(Path.Combine(Folder, name)));
        return [.. json.RootElement.EnumerateArray().Select(e => e.Clone())];
    }

    /// <summary>Small GIF, BMP and TGA files, which only the repository has.</summary>
    public static IEnumerable<JsonElement> Corners()
    {
        using var json = JsonDocument.Parse(
            File.ReadAllBytes(Path.Combine(ReferenceFile.Root, "images", "corners.json")));
        return [.. json.RootElement.EnumerateArray().Select(e => e.Clone())];
    }

    /// <summary>Lines of slices.jsonl, stored compressed in the repository.</summary>
    public static IEnumerable<string> SliceLines()
    {
        string plain = Path.Combine(Folder, "slices.jsonl");
        if (File.Exists(plain)) return File.ReadLines(plain);
        using var text = new StreamReader(new GZipStream(
            File.OpenRead(plain + ".gz"), CompressionMode.Decompress));
        return text.ReadToEnd().Split('\n', StringSplitOptions.RemoveEmptyEntries);
    }

    public static string Hash(ReadOnlySpan<byte> bytes) =>
        Convert.ToHexStringLower(SHA256.HashData(bytes));

    /// <summary>The reference's picture number k, which needs no file.</summary>
    public static Picture Formula(int width, int height, int k)
    {
        var picture = new Picture(width, height);
        var rgb = picture.Rgb;
        int i = 0;
        for (long y = 0; y < height; y++)
        {
            for (long x = 0; x < width; x++)
            {
                for (int c = 0; c < 3; c++)
                {
                    long v = (7 * x) + (13 * y) + (29 * c) + (31 * k);
                    rgb[i++] = (byte)(v ^ ((x * y) >> 5) ^ (((x * x) + (c * y)) >> 7));
                }
            }
        }

        return picture;
    }
}
