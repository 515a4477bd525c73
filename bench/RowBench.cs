using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine.Data;
using Parquet.Serialization;

namespace MiniCpmNative.Bench;

/// <summary>
/// Rows per second of processor time of every format, the same conversations in each; formats take
/// turns, and the median of the rounds counts. Usage: bench rows [--rows 20000] [--rounds 7]
/// </summary>
public static class RowBench
{
    private static readonly UTF8Encoding s_utf8 = new(false);

    public static int Run(string[] args)
    {
        int rows = 20_000, rounds = 7;
        for (int i = 0; i + 1 < args.Length; i += 2)
        {
            if (args[i] == "--rows") rows = int.Parse(args[i + 1]);
            else if (args[i] == "--rounds") rounds = int.Parse(args[i + 1]);
        }

        string folder = Directory.CreateTempSubdirectory("rows").FullName;
        try
        {
            Measure(Write(folder, rows), rows, rounds);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }

        return 0;
    }

    private static void Measure((string Name, string Path)[] files, int rows, int rounds)
    {
        double[][] seconds = [.. files.Select(_ => new double[rounds])];
        for (int round = -2; round < rounds; round++)
        {
            for (int i = 0; i < files.Length; i++)
            {
                TimeSpan begun = Environment.CpuUsage.TotalTime;
                RowSet set = RowFile.Read(files[i].Path);
                double took = (Environment.CpuUsage.TotalTime - begun).TotalSeconds;
                if (set.Rows.Count != rows)
                    throw new InvalidOperationException(
                        $"{files[i].Name}: {set.Rows.Count} rows; "
                            + $"{set.Bad.FirstOrDefault()?.Reason}");
                if (round >= 0) seconds[i][round] = took;
            }
        }

        double official = 0;
        for (int i = 0; i < files.Length; i++)
        {
            double median = seconds[i].Order().ElementAt(rounds / 2);
            if (i == 0) official = median;
            Console.WriteLine($"{files[i].Name,-24} {rows / median,10:N0} rows/s "
                + $"{new FileInfo(files[i].Path).Length / median / 1e6,6:N0} MB/s "
                + $"{official / median,6:f2} of the official format's rate");
        }
    }

    private sealed record Talk(string Id, string Picture, string[] Texts);

    private static (string, string)[] Write(string folder, int rows)
    {
        var random = new Random(1);
        string Words(int count) => string.Join(
            ' ', Enumerable.Range(0, count).Select(_ => $"word{random.Next(10_000)}"));
        Talk[] talks =
            [.. Enumerable.Range(0, rows).Select(i => new Talk($"{i}", $"pictures/{i}.jpg",
            [Words(12), Words(40), Words(12), Words(40)]))];

        (string, string) File(string name, string ending, Action<Stream> write)
        {
            string path = Path.Combine(folder, name.Replace(' ', '_') + ending);
            using var stream = System.IO.File.Create(path);
            write(stream);
            return (name, path);
        }

        (string, string) List(string name, Func<Talk, object> row) =>
            File(name, ".json", stream => JsonSerializer.Serialize(stream, talks.Select(row)));
        (string, string) Lines(string name, Func<Talk, object> row) =>
            File(name, ".jsonl", stream =>
        {
            foreach (Talk talk in talks)
            {
                JsonSerializer.Serialize(stream, row(talk));
                stream.WriteByte((byte)'\n');
            }
        });

        return
        [
            List("official", Official),
            Lines("official, lines", Official),
            Lines("ms-swift messages", t => new
            {
                messages = Turns(t, "role", "content", "user", "assistant"),
                images = new[] { t.Picture },
            }),
            Lines("query, response", t => new
            {
                query = "<image>" + t.Texts[2],
                response = t.Texts[3],
                history = new[] { new[] { t.Texts[0], t.Texts[1] } },
                images = new[] { t.Picture },
            }),
            List("LLaVA", t => new
            {
                id = t.Id,
                image = t.Picture,
                conversations = Turns(t, "from", "value", "human", "gpt"),
            }),
            Lines("OpenAI parts", t => new
            {
                messages = t.Texts.Select((text, i) => (object)new
                {
                    role = i % 2 == 0 ? "user" : "assistant",
                    content = i > 0 ? (object)text : new object[]
                    {
                        new { type = "image_url", image_url = new { url = t.Picture } },
                        new { type = "text", text },
                    },
                }),
            }),
            File("CSV", ".csv", stream => Csv(stream, talks)),
            File("Parquet", ".parquet", stream => ParquetSerializer.SerializeAsync(
                talks.Select(t => new Columns
                {
                    Messages = [.. t.Texts.Select((text, i) => new Turn
                    {
                        Role = i % 2 == 0 ? "user" : "assistant",
                        Content = (i == 0 ? "<image>" : "") + text,
                    })],
                    Images = [t.Picture],
                }), stream).GetAwaiter().GetResult()),
        ];
    }

    private static object Official(Talk talk) => new
    {
        id = talk.Id,
        image = talk.Picture,
        conversations = Turns(talk, "role", "content", "user", "assistant"),
    };

    private static Dictionary<string, string>[] Turns(
        Talk talk, string role, string content, string user, string assistant) =>
        [.. talk.Texts.Select((text, i) => new Dictionary<string, string>
        {
            [role] = i % 2 == 0 ? user : assistant,
            [content] = (i == 0 ? "<image>\n" : "") + text,
        })];

    private static void Csv(Stream stream, Talk[] talks)
    {
        using var writer = new StreamWriter(stream, s_utf8, leaveOpen: true);
        writer.Write("query,response,history,images\n");
        foreach (Talk t in talks)
            writer.Write($"<image>{t.Texts[2]},{t.Texts[3]},"
                + $"\"[[\"\"{t.Texts[0]}\"\",\"\"{t.Texts[1]}\"\"]]\",{t.Picture}\n");
    }

    private sealed class Columns
    {
        [System.Text.Json.Serialization.JsonPropertyName("messages")]
        public List<Turn> Messages { get; set; } = [];

        [System.Text.Json.Serialization.JsonPropertyName("images")]
        public List<string> Images { get; set; } = [];
    }

    private sealed class Turn
    {
        [System.Text.Json.Serialization.JsonPropertyName("role")]
        public string Role { get; set; } = "";

        [System.Text.Json.Serialization.JsonPropertyName("content")]
        public string Content { get; set; } = "";
    }
}
