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
    public static byte[] Bytes(string name)
    {
        string path = Find(name) ?? throw new FileNotFoundException(name);
        if (!path.EndsWith(".gz", StringComparison.Ordinal)) return File.ReadAllBytes(path);
        using var file = File.OpenRead(path);
        using var unpacked = new GZipStream(file, CompressionMode.Decompress);
        using var bytes = new MemoryStream();
        unpacked.CopyTo(bytes);
        return bytes.ToArray();
    }

    /// <summary>Whether there is such a file.</summary>
    public static bool Has(string name) => Find(name) is not null;

    // What the full set lacks is read from the committed one.
    private static string? Find(string name) => new[]
    {
        Path.Combine(Root, name), Path.Combine(Root, name + ".gz"),
        Path.Combine(ReferenceFile.Root, name), Path.Combine(ReferenceFile.Root, name + ".gz"),
    }.FirstOrDefault(File.Exists);

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
