using System.IO.Compression;
using System.Text.Json;

namespace MiniCpmNative.Tests;

/// <summary>
/// Text files of tests/reference, or of the folder CPMX_REFERENCE names, which may hold the full
/// set; plain or with .gz behind the name.
/// </summary>
internal static class ReferenceText
{
    /// <summary>The folder in use.</summary>
    public static string Root { get; } =
        Environment.GetEnvironmentVariable("CPMX_REFERENCE") is { Length: > 0 } full
            ? full : ReferenceFile.Root;

    /// <summary>All bytes of NAME or NAME.gz, for instance "tokenizers/strings.jsonl".</summary>
    public static byte[] Bytes(string name) => Unpacked(Path.Combine(Root, name));

    /// <summary>
    /// All bytes of tests/reference/families/NAME or NAME.gz; these files are there whole.
    /// </summary>
    public static byte[] Family(string name) =>
        Unpacked(Path.Combine(ReferenceFile.Root, "families", name));

    /// <summary>A .json file of tests/reference, whatever folder is in use.</summary>
    public static JsonElement CommittedJson(string name) => Parse(
        System.Text.Encoding.UTF8.GetString(Unpacked(Path.Combine(ReferenceFile.Root, name))));

    /// <summary>A .json file of tests/reference/families.</summary>
    public static JsonElement FamilyJson(string name) =>
        Parse(System.Text.Encoding.UTF8.GetString(Family(name)));

    private static byte[] Unpacked(string path)
    {
        if (File.Exists(path)) return File.ReadAllBytes(path);
        using var file = File.OpenRead(path + ".gz");
        using var unpacked = new GZipStream(file, CompressionMode.Decompress);
        using var bytes = new MemoryStream();
        unpacked.CopyTo(bytes);
        return bytes.ToArray();
    }

    /// <summary>Whether the folder in use has the file.</summary>
    public static bool Has(string name) =>
        File.Exists(Path.Combine(Root, name)) || File.Exists(Path.Combine(Root, name + ".gz"));

    /// <summary>The objects of a .jsonl file.</summary>
    public static JsonElement[] Lines(string name)
    {
        var lines = System.Text.Encoding.UTF8.GetString(Bytes(name))
            .Split('\n', StringSplitOptions.RemoveEmptyEntries);
        return Array.ConvertAll(lines, line => Parse(line));
    }

    /// <summary>A .json file.</summary>
    public static JsonElement Json(string name) =>
        Parse(System.Text.Encoding.UTF8.GetString(Bytes(name)));

    /// <summary>An array of numbers.</summary>
    public static int[] Ints(JsonElement list) =>
        [.. list.EnumerateArray().Select(item => item.GetInt32())];

    private static JsonElement Parse(string text)
    {
        using var document = JsonDocument.Parse(text);
        return document.RootElement.Clone();
    }
}
