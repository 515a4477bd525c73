using System.Text;
using System.Text.RegularExpressions;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The examples of docs/data.md, which are all one row; rows written in the official format;
/// several files; the share for evaluation; damaged files of every format.
/// </summary>
[TestFixture]
public sealed partial class DataFormatDocTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    internal static string[] Examples(string kind)
    {
        string doc = Path.Combine(
            ReferenceFile.Root, "..", "..", "docs", "data.md");
        return [.. Block().Matches(File.ReadAllText(doc)).Where(m => m.Groups[1].Value == kind)
            .Select(m => m.Groups[2].Value)];
    }

    private static RowSet Parse(string name, string text) =>
        RowFile.Parse(name, Encoding.UTF8.GetBytes(text));

    [Test]
    public void EveryFormatOfTheManualIsTheSameRow()
    {
        string[] json = Examples("json"), csv = Examples("csv");
        Assert.That((json.Length, csv.Length), Is.EqualTo((10, 1)));
        string?[] formats = [null, "ms-swift", "questions", "Alpaca", "ShareGPT", "LLaVA", "OpenAI"];
        for (int i = 0; i < formats.Length; i++) Same(Parse("rows.json", json[i]), formats[i]);
        Same(Parse("rows.csv", csv[0]), "questions");

        static void Same(RowSet set, string? format)
        {
            Assert.That(set.Bad, Is.Empty);
            Assert.That(set.Format, format is null ? Is.Null : Does.StartWith(format));
            Row row = set.Rows.Single();
            Assert.That(row.Turns.Select(turn => (turn.Role, turn.Content, turn.Trained)), Is.EqualTo(
                new (string, string, bool?)[]
                {
                    ("user", "<image>\nWhat is it?", null), ("assistant", "A cat.", true),
                }), $"{format}");
            Assert.That(row.Pictures.Select(picture => picture.Path), Is.EqualTo((string[])["cat.png"]));
        }
    }

    [Test]
    public void TheBoxOfTheManualIsFilledIn()
    {
        Row row = Parse("rows.json", Examples("json")[7]).Rows.Single();
        var turns = row.Objects!.Fill(row, BoxFormat.Text, _ => new(448, 448)).Turns;
        Assert.That(turns.Select(turn => turn.Content), Is.EqualTo((string[])
            ["<image>\nWhere is the cat?", "[(250,112),(750,500)]"]));
    }

    [Test]
    public void RowsAreConvertedToTheOfficialFormat()
    {
        string data = Path.Combine(ReferenceFile.Root, "formats", "data");
        string result = Path.Combine(_folder, "out.jsonl");
        string[] files = ["messages.jsonl", "messages.parquet", "llava.json", "objects.jsonl"];
        var text = new StringWriter();
        string[] arguments = ["data", "convert", .. files.Select(f => Path.Combine(data, f)), result];
        Assert.That(new CommandLine(text, text, new Runners()).Run(arguments), Is.EqualTo(2));
        Assert.That(text.ToString(), Does.Contain("nothing is written").And.Contain("messages.jsonl row 9"));
        Assert.That(File.Exists(result), Is.False);
        arguments = [.. arguments, "--on_bad_row=skip"];
        Assert.That(new CommandLine(text, text, new Runners()).Run(arguments), Is.Zero);
        Assert.That(text.ToString(), Does.Contain("rows written").And.Contain("have a system turn"));

        RowSet official = RowFile.Read(result);
        Assert.That(official.Format, Is.Null);
        var (before, _, _) = DataRows.ReadSet(
            new DataSources(files.Select(f => Path.Combine(data, f))), default, BoxFormat.Text);
        var readable = before.Rows.Where(IsWhole).ToList();
        var after = official.Rows.ToList();
        Assert.That(after, Has.Count.EqualTo(readable.Count).And.Count.GreaterThan(40));
        foreach (var (from, to) in readable.Zip(after))
        {
            // The same text, and the same bytes of the same pictures in the same places.
            var (turns, pictures) = RowText.Compose(from, (_, n) => $"[{n}]", []);
            var (again, same) = RowText.Compose(to, (_, n) => $"[{n}]", []);
            Assert.That(again, Is.EqualTo(turns));
            Assert.That(same.Select(i => Content(to, i)), Is.EqualTo(pictures.Select(i => Content(from, i))));
        }

        static bool IsWhole(Row row)
        {
            try
            {
                _ = RowText.Compose(row, (_, _) => "", []);
                return row.Pictures.All(p => p.Bytes is not null || row.Locate(p).Length > 0);
            }
            catch (BadRowException)
            {
                return false;
            }
        }

        static byte[] Content(Row row, int picture) => row.Pictures[picture].Bytes
            ?? File.ReadAllBytes(row.Locate(row.Pictures[picture]));
    }

    [Test]
    public void SeveralFilesAreOneSetAndAShareIsKept()
    {
        for (int file = 0; file < 3; file++)
            File.WriteAllLines(Path.Combine(_folder, $"{"cab"[file]}.jsonl"), Enumerable.Range(0, 7).Select(
                i => $$"""{"query":"q","response":"{{"cab"[file]}}{{i}}"}"""));
        File.WriteAllText(Path.Combine(_folder, "notes.txt"), "no rows");
        string[] all = Answers(_folder);
        Assert.That(all, Has.Length.EqualTo(21));
        Assert.That((all[0], all[^1]), Is.EqualTo(("a0", "c6")), "in the order of names");
        Assert.That(Answers(Path.Combine(_folder, "*.jsonl")), Is.EqualTo(all));
        Assert.That(Answers(new DataSources(
            new[] { "c", "a" }.Select(name => Path.Combine(_folder, name + ".jsonl")))),
            Is.EqualTo(all[14..].Concat(all[..7])), "in the order given");
        foreach (var (kept, count) in ((double, int)[])[(0.1, 3), (4, 4)])
        {
            var share = new RowShare(kept, Seed: 1, Evaluates: true);
            string[] held = Answers(new DataSources(_folder) { Share = share });
            string[] rest = Answers(new DataSources(_folder) { Share = share with { Evaluates = false } });
            Assert.That(held, Has.Length.EqualTo(count));
            Assert.That(held.Concat(rest).Order(), Is.EqualTo(all.Order()));
            Assert.That(Answers(new DataSources(_folder) { Share = share with { Seed = 2 } }),
                Is.Not.EqualTo(held));
        }

        Assert.That(() => Answers(Path.Combine(_folder, "*.csv")), Throws.TypeOf<InputException>());
        Assert.That(() => Answers(new DataSources(_folder) { Share = new(21, 1, false) }),
            Throws.TypeOf<InputException>().With.Message.Contains("none is left to train on"));

        static string[] Answers(DataSources sources) => [.. DataRows.ReadSet(
            sources, default, BoxFormat.Text).Set.Rows.Select(row => row.Expected!)];
    }

    [Test]
    public void DamagedFilesOfEveryFormatAreReadOrRefusedInOneLine()
    {
        string data = Path.Combine(ReferenceFile.Root, "formats", "data");
        string[] files =
        [
            "messages.jsonl", "query.jsonl", "alpaca.json", "sharegpt.json", "llava.json", "query.csv",
            "openai_parts.jsonl", "objects.jsonl", "loss.jsonl", "messages.parquet", "query.parquet",
        ];
        int read = 0, refused = 0;
        foreach (string file in files)
        {
            byte[] good = File.ReadAllBytes(Path.Combine(data, file));
            var mutations = new Mutations(file.Length);
            for (int i = 0; i < (file.EndsWith("parquet") ? 150 : 400); i++)
            {
                try
                {
                    RowSet set = RowFile.Parse(Path.Combine(data, file), mutations.Bytes(good));
                    read++;
                    foreach (BadRow bad in set.Bad) OneLine($"{bad}");
                    foreach (Row row in set.Rows) Fill(row);
                }
                catch (InputException failure)
                {
                    refused++;
                    OneLine(failure.Message);
                }
            }
        }

        Assert.That(Math.Min(read, refused), Is.GreaterThan(100));

        static void Fill(Row row)
        {
            try
            {
                _ = row.Objects?.Fill(row, BoxFormat.Tokens, _ => new(10, 10));
                _ = RowText.Compose(row, (_, _) => "", []);
            }
            catch (BadRowException failure)
            {
                OneLine(failure.Message);
            }
        }

        static void OneLine(string message) => Assert.That(message, Is.Not.Empty.And.Not.Contain("\n")
            .And.Not.Contain("LineNumber").And.Not.Contain("reader options"));
    }

    [GeneratedRegex(@"```(json|csv)\n(.*?)```", RegexOptions.Singleline)]
    private static partial Regex Block();
}
