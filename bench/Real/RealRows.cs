using System.Buffers.Binary;
using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// Rows of random words, longer than the tokens that are kept, of which the second half is
/// supervised; with a picture of noise in each where asked for.
/// </summary>
internal static class RealRows
{
    public const int PictureSide = 1344;

    private const int Rows = 8, Words = 400;

    /// <summary>Writes the rows; returns their file.</summary>
    /// <param name="folder">Where to.</param>
    /// <param name="tokenizer">By which lengths are measured.</param>
    /// <param name="tokens">Tokens that each row has at least.</param>
    /// <param name="pictureSide">Side of the square picture in each row; 0 for none.</param>
    public static string Write(string folder, Tokenizer tokenizer, int tokens, int pictureSide)
    {
        var random = new Random(1);
        string[] words = [.. Enumerable.Range(0, Words).Select(_ => Word(random))];
        string sample = Text(words, 1000, random);
        double perWord = tokenizer.Encode(sample).Length / 1000.0;
        int half = (int)Math.Ceiling(0.5 * tokens / perWord);
        string picture = "";
        if (pictureSide > 0)
        {
            picture = Path.Combine(folder, $"noise-{pictureSide}.bmp");
            Noise(picture, pictureSide);
        }

        var rows = Enumerable.Range(0, Rows).Select(id => new Dictionary<string, object>
        {
            ["id"] = id,
            ["image"] = picture,
            ["conversations"] = new[]
            {
                new { role = "user", content = (picture.Length > 0 ? "<image>\n" : "")
                    + Text(words, picture.Length > 0 ? Math.Min(40, half / 4) : half, random) },
                new { role = "assistant", content = Text(words, 2 * half, random) },
            },
        }).ToArray();
        if (picture.Length == 0) foreach (var row in rows) row.Remove("image");
        string file =
            Path.Combine(folder, $"rows-{tokens}{(picture.Length > 0 ? "-pictures" : "")}.json");
        File.WriteAllText(file, JsonSerializer.Serialize(rows));
        return file;
    }

    private static string Word(Random random) => string.Create(
        random.Next(3, 9), random, (letters, from) =>
        {
            foreach (ref char letter in letters) letter = (char)('a' + from.Next(26));
        });

    private static string Text(string[] words, int count, Random random) => string.Join(
        ' ', Enumerable.Range(0, count).Select(_ => words[random.Next(words.Length)]));

    // A BMP of 24 bits.
    private static void Noise(string path, int side)
    {
        const int Header = 54;
        int stride = ((3 * side) + 3) & ~3;
        var bytes = new byte[Header + (stride * side)];
        new Random(2).NextBytes(bytes);
        Span<byte> header = bytes.AsSpan(0, Header);
        header.Clear();
        (header[0], header[1]) = ((byte)'B', (byte)'M');
        BinaryPrimitives.WriteInt32LittleEndian(header[2..], bytes.Length);
        BinaryPrimitives.WriteInt32LittleEndian(header[10..], Header);
        BinaryPrimitives.WriteInt32LittleEndian(header[14..], 40);
        BinaryPrimitives.WriteInt32LittleEndian(header[18..], side);
        BinaryPrimitives.WriteInt32LittleEndian(header[22..], side);
        BinaryPrimitives.WriteInt16LittleEndian(header[26..], 1);
        BinaryPrimitives.WriteInt16LittleEndian(header[28..], 24);
        File.WriteAllBytes(path, bytes);
    }
}
