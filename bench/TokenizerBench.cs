using System.Globalization;
using System.IO.Compression;
using System.Text;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Bench;

/// <summary>
/// Megabytes of UTF-8 per second of processor time on one thread: bench tokenizer [FOLDER
/// [TEXT...]]. FOLDER holds a model's tokenizer, or tokenizer.json.gz alone, by default the real
/// MiniCPM-o 4.5 vocabulary of the tests.
/// Without text files it draws English and Chinese from that vocabulary, words and characters by
/// Zipf's law: the Chinese runs hardly repeat, so there the merging itself is measured.
/// </summary>
public static class TokenizerBench
{
    private const int Chars = 2_000_000;

    public static void Run(string[] args)
    {
        string folder = args.Length > 0 ? args[0] : "tests/reference/tokenizers/o-4_5";
        string packed = Path.Combine(folder, "tokenizer.json.gz");
        var before = Environment.CpuUsage.TotalTime;
        var tokenizer = File.Exists(packed) ? Tokenizer.Parse(Unpacked(packed), null)
            : Tokenizer.Load(folder);
        var load = Environment.CpuUsage.TotalTime - before;
        Console.WriteLine($"load                {load.TotalMilliseconds,7:F0} ms");
        if (args.Length < 2)
        {
            Measure("english", English(tokenizer), tokenizer);
            Measure("chinese", Chinese(tokenizer), tokenizer);
        }
        foreach (string file in args.Skip(1))
            Measure(Path.GetFileName(file), File.ReadAllText(file), tokenizer);
    }

    private static void Measure(string name, string text, Tokenizer tokenizer)
    {
        // Rows of a data set are short texts: pieces of about a thousand characters.
        string[] rows = [.. text.Chunk(1000).Select(chunk => new string(chunk))];
        double megabytes = Encoding.UTF8.GetByteCount(text) / 1e6, best = double.MaxValue;
        var ids = new List<int>();
        long tokens = 0;
        for (int run = 0; run < 5; run++)
        {
            tokens = 0;
            var before = Environment.CpuUsage.TotalTime;
            foreach (string row in rows)
            {
                ids.Clear();
                tokenizer.Encode(row, ids);
                tokens += ids.Count;
            }
            best = Math.Min(best, (Environment.CpuUsage.TotalTime - before).TotalSeconds);
            if (run == 0) Line($"{name} (cold)", megabytes, best, tokens);
        }
        Line(name, megabytes, best, tokens);
    }

    private static void Line(string name, double megabytes, double seconds, long tokens) =>
        Console.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"{name,-20}{megabytes / seconds,7:F1} MB/s  {tokens / seconds / 1e6:F2} M tokens/s"));

    private static string English(Tokenizer tokenizer)
    {
        var words = Texts(tokenizer).Where(word => word.Length > 1 && word[0] == ' '
            && word.AsSpan(1).IndexOfAnyExcept(Letters) < 0).ToArray();
        var random = new Random(1);
        var text = new StringBuilder();
        while (text.Length < Chars)
        {
            text.Append(words[Zipf(random, words.Length)]);
            // One word in ten is new, one in eight ends a clause.
            if (random.Next(10) == 0) text.Append(words[random.Next(words.Length)].AsSpan(1));
            if (random.Next(8) == 0) text.Append(random.Next(3) == 0 ? ".\n" : ",");
        }
        return text.ToString();
    }

    private static string Chinese(Tokenizer tokenizer)
    {
        var signs = Texts(tokenizer)
            .Where(sign => sign.Length == 1 && sign[0] is >= '\u4E00' and <= '\u9FFF').ToArray();
        var random = new Random(1);
        var text = new StringBuilder();
        while (text.Length < Chars)
        {
            for (int n = random.Next(4, 20); n > 0; n--)
                text.Append(signs[Zipf(random, signs.Length)]);
            text.Append("，，。；：！？"[random.Next(7)]);
        }
        return text.ToString();
    }

    // Each token's text inside a text: at its start decoding may take a space away.
    private static IEnumerable<string> Texts(Tokenizer tokenizer)
    {
        int first = tokenizer.Encode("a")[0];
        int length = tokenizer.Decode([first]).Length;
        return Enumerable.Range(0, tokenizer.Size)
            .Select(id => tokenizer.Decode([first, id])[length..]);
    }

    private static System.Buffers.SearchValues<char> Letters { get; } =
        System.Buffers.SearchValues.Create("abcdefghijklmnopqrstuvwxyz");

    // Rank r is drawn with a probability of about 1 / r.
    private static int Zipf(Random random, int count) =>
        Math.Min(count - 1, (int)Math.Exp(random.NextDouble() * Math.Log(count)) - 1);

    private static byte[] Unpacked(string path)
    {
        using var unpacked = new GZipStream(File.OpenRead(path), CompressionMode.Decompress);
        using var bytes = new MemoryStream();
        unpacked.CopyTo(bytes);
        return bytes.ToArray();
    }
}
