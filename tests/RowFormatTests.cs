using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Rows of other tools against what ms-swift 4.6.0 and LLaMA-Factory 0.9.5 make of them, row by
/// row: turns, pictures, which answers are trained, boxes. What a tool drops or fails on is refused
/// here too. Every other difference stands in differences.tsv with what is said here, or "read".
/// </summary>
[TestFixture]
public sealed class RowFormatTests
{
    private const string DefaultSystem = "You are a helpful assistant.";

    private static readonly ILookup<string, string> s_differences = System.Text.Encoding.UTF8
        .GetString(ReferenceText.Bytes("formats/differences.tsv"))
        .Split('\n', StringSplitOptions.RemoveEmptyEntries)
        .ToLookup(line => line.Split('\t')[0], line => line.Split('\t')[1]);

    private static string Folder => Path.Combine(ReferenceFile.Root, "formats");

    private static IEnumerable<TestCaseData> Files(string tool) => ReferenceText
        .Lines("formats/files.json")[0].GetProperty(tool).EnumerateObject()
        .Select(file => new TestCaseData(file.Name).SetArgDisplayNames(file.Name));

    [TestCaseSource(nameof(Files), ["swift"])]
    public void RowsAreWhatSwiftMakesOfThem(string name)
    {
        string path = Path.Combine(Folder, "data", name);
        var (all, last) = Read(options => RowFile.Parse(path, File.ReadAllBytes(path), options));
        var rows = ReferenceText.Lines("formats/swift_rows.jsonl")
            .Where(row => row.GetProperty("file").GetString() == name).ToList();
        // Without rows the tool cannot read the file at all.
        if (rows.Count == 0) Compare($"swift {name}", all.Refused ?? "read", null);
        foreach (var row in rows)
        {
            int index = row.GetProperty("row").GetInt32();
            string place = $"swift {name} {Case(row, index)}";
            bool boxes = row.TryGetProperty("pieces", out _);
            bool same = Compare(place, Ours(all, index, boxes), Swift(row, "default"));
            if (same && !boxes && Swift(row, "last_round") is { } theirs)
                Assert.That(Ours(last, index, boxes), theirs.Contains("true")
                    ? Is.EqualTo(theirs) : Does.StartWith("no answer is learned"), place);
        }
    }

    [TestCaseSource(nameof(Files), ["lf"])]
    public void RowsAreWhatLlamaFactoryMakesOfThem(string name)
    {
        var (all, last) = Read(options =>
        {
            var (path, columns) =
                DatasetInfo.Entry(Path.Combine(Folder, DatasetInfo.FileName), name);
            return RowFile.Parse(path, File.ReadAllBytes(path), options, columns: columns);
        });
        var rows = ReferenceText.Lines("formats/lf_rows.jsonl")
            .Where(row => row.GetProperty("entry").GetString() == name).ToList();
        if (rows.Count == 0) Compare($"factory {name}", all.Refused ?? "read", null);
        foreach (var row in rows)
        {
            int index = row.GetProperty("row").GetInt32();
            string place = $"factory {name} {Case(row, index)}";
            bool same = Compare(place, Ours(all, index, boxes: false), Factory(row, "default"));
            // A turn's own mark goes before train_on; LLaMA-Factory does not know it.
            if (same && name != "loss" && Factory(row, "mask_history") is { } theirs)
                Assert.That(Ours(last, index, boxes: false), Is.EqualTo(theirs), place);
        }
    }

    [Test]
    public void BoxesAreScaledAsSwiftDoes()
    {
        foreach (var line in ReferenceText.Lines("formats/boxes.json")[0].GetProperty(
            "cases").EnumerateArray())
        {
            string type = line.GetProperty("type").GetString() ?? "real";
            // ms-swift takes norm1000 for pixels; here it is what it says.
            if (type == "norm1000") continue;
            var objects = JsonSerializer.SerializeToElement(new JsonObject
            {
                ["bbox"] = new JsonArray(JsonNode.Parse(line.GetProperty("box").GetRawText())),
                ["bbox_type"] = type,
            });
            var row = new Row("rows.jsonl", 1, null, PictureNames.Single, [new("<image>", "a.png")],
                [new("user", "<bbox>")]);
            int[] size = ReferenceText.Ints(line.GetProperty("size"));
            var filled = Grounding.Read(objects)!.Fill(
                row, BoxFormat.Text, _ => new(size[0], size[1]));
            Assert.That(filled.Turns[0].Content,
                Is.EqualTo(line.GetProperty("norm1000_text").GetString()), line.GetRawText());
        }
    }

    [TestCase("norm1000", BoxFormat.Text, "cat [(10,20),(30,40)]")]
    [TestCase("norm1000", BoxFormat.Tokens, "<ref>cat</ref> <box>10 20 30 40</box>")]
    [TestCase("real", BoxFormat.Tokens, "<ref>cat</ref> <box>100 400 300 800</box>")]
    public void BoxesInTheModelsOwnTokens(string type, BoxFormat format, string text)
    {
        var objects = JsonSerializer.SerializeToElement(new
        {
            @ref = (string[])["cat"],
            bbox = (int[][])[[30, 20, 10, 40]],
            bbox_type = type,
        });
        var row = new Row("rows.jsonl", 1, null, PictureNames.Single, [new("<image>", "a.png")],
            [new("user", "<ref-object> <bbox>")]);
        Assert.That(Grounding.Read(objects)!.Fill(row, format, _ => new(100, 50)).Turns[0].Content,
            Is.EqualTo(text));
    }

    // Whether the two agree, where they are not known to differ.
    private static bool Compare(string place, string ours, string? theirs)
    {
        if (theirs is null ? !ours.StartsWith('{') && ours != "read" : ours == theirs)
            return theirs is not null;
        string said = ours.StartsWith('{') ? "read" : ours;
        if (!s_differences[place].Any(said.StartsWith))
            Assert.Fail($"{place}\tours {said}\t{ours}\ttheirs {theirs}");
        return false;
    }

    private static string Case(JsonElement row, int index) =>
        row.TryGetProperty("case", out var named) ? $"{named}" : $"{index}";

    private static ((RowSet? Set, string? Refused) All, (RowSet? Set, string? Refused) Last) Read(
        Func<RowOptions, RowSet> read)
    {
        return (Try(default), Try(new(LastOnly: true)));

        (RowSet?, string?) Try(RowOptions options)
        {
            try
            {
                return (read(options), null);
            }
            catch (InputException failure)
            {
                Assert.That(failure.Message, Does.Not.Contain("\n"));
                // Without the path.
                return (null, failure.Message[(failure.Message.IndexOf(": ") + 2)..]);
            }
        }
    }

    private static string Ours((RowSet? Set, string? Refused) read, int index, bool boxes)
    {
        if (read.Set is not { } set) return read.Refused!;
        // Numbers of a .jsonl file are those of its lines, blank ones among them.
        int[] places =
            [.. set.Rows.Select(r => r.Place).Concat(set.Bad.Select(b => b.Place)).Order()];
        if (index >= places.Length) return "no such row";
        if (set.Bad.FirstOrDefault(b => b.Place == places[index]) is { } bad) return bad.Reason;
        Row row = set.Rows.Single(r => r.Place == places[index]);
        try
        {
            if (row.Objects is { } objects)
                row = objects.Fill(row, BoxFormat.Text, k => DataRows.Probe(row, k).Size);
            _ = RowText.Compose(row, (_, _) => "", []);
        }
        catch (BadRowException failure)
        {
            return failure.Row.Reason;
        }

        var turns = row.Turns.ToList();
        IReadOnlyList<string> tools = turns[0].Tools ?? [];
        string system =
            turns[0] is { Role: "system", Content.Length: > 0 } said ? said.Content : DefaultSystem;
        if (turns[0].Role == "system") turns.RemoveAt(0);
        if (!turns.Any(t => t.Content.Contains("<image", StringComparison.Ordinal)))
            turns[0] = turns[0] with
            {
                Content = string.Concat(row.Pictures.Select(_ => "<image>")) + turns[0].Content,
            };
        if (boxes)
            return "{" + string.Join('|',
                turns.Where(t => t.Trained == true).Select(t => t.Content));
        return Row(system, tools, turns.Select(t => (t.Role, t.Role == "tool" ? Result(t.Content)
                : t.Content + string.Join('\n', (t.Calls ?? []).Select(Call)))),
            row.Pictures.Select(Source),
            turns.Where(t => t.Role == "assistant").Select(t => t.Trained == true));

        static string Source(RowPicture picture) =>
            picture.Bytes is null ? picture.Path : "in the row";
    }

    private static string Result(string content) => $"<tool_response>\n{content}\n</tool_response>";

    private static string Call(ToolCall call) => "<tool_call>\n"
        + $"{{\"name\": \"{call.Name}\", \"arguments\": {call.Arguments}}}\n</tool_call>";

    private static string Row(string system, IEnumerable<string> tools,
        IEnumerable<(string Role, string Content)> turns, IEnumerable<string> pictures,
        IEnumerable<bool> trained) => JsonSerializer.Serialize(new
        {
            system,
            tools,
            turns = turns.Aggregate(new List<string>(), (list, t) =>
            {
                // Results behind each other are one turn in some of the formats.
                if (t.Role == "tool" && list[^1].StartsWith("tool: ", StringComparison.Ordinal))
                    list[^1] += "\n" + t.Content;
                else list.Add($"{t.Role}: {t.Content}");
                return list;
            }),
            pictures,
            trained,
        });

    // Null where the tool leaves the row out or fails.
    private static string? Swift(JsonElement row, string scale)
    {
        if (!row.TryGetProperty("turns", out var turns)) return null;
        if (row.TryGetProperty("pieces", out var pieces))
            return "{" + string.Join('|', pieces.EnumerateArray().Where(p => p[1].GetInt32() == 1)
                .Select(p => p[0].GetString()!.Replace("<|im_end|>\n", "")));
        string[] system = row.GetProperty("system").GetString()!.Split("\n\n# Tools\n\n");
        string[] tools = system.Length == 1 ? []
            : system[1].Split("<tools>\n")[1].Split("\n</tools>")[0].Split('\n');
        // A row that ends with a question has an open answer there. An empty system text is none.
        return Row(tools.Length > 0 && system[0] == "" ? DefaultSystem
            : system[0], tools, turns.EnumerateArray()
                .Where(t => t.TryGetProperty("content", out _))
                .Select(t =>
                    (t.GetProperty("role").GetString()!, Content(t.GetProperty("content")))),
            row.GetProperty("pictures").EnumerateArray().Select(p =>
                p[0].ValueKind == JsonValueKind.String ? p[0].GetString()! : "in the row"),
            Answers(turns, Flags(row.GetProperty("answers").GetProperty(scale))));

        static string Content(JsonElement content)
        {
            if (content.ValueKind != JsonValueKind.Array) return $"{content}";
            string text = string.Concat(content.EnumerateArray());
            int from = text.IndexOf("<tool_response>", StringComparison.Ordinal);
            int end = text.LastIndexOf("<|im_end|>", StringComparison.Ordinal);
            return end < 0 ? text : text[Math.Max(0, from)..end];
        }

        // Text and calls are one answer here.
        static IEnumerable<bool> Answers(JsonElement turns, IEnumerable<bool> flags)
        {
            var left = new Queue<bool>(flags);
            foreach (var turn in turns.EnumerateArray())
            {
                if ($"{turn.GetProperty("role")}" != "assistant" || left.Count == 0) continue;
                bool flag = left.Dequeue();
                if (turn.TryGetProperty("content", out var content)
                    && content.ValueKind == JsonValueKind.Array)
                    for (int i = 1; i < content.GetArrayLength(); i++) left.Dequeue();
                yield return flag;
            }

            foreach (bool flag in left) yield return flag;
        }
    }

    private static string? Factory(JsonElement row, string option)
    {
        if (!row.TryGetProperty("turns", out var trained)) return null;
        var aligned = row.GetProperty("aligned");
        var turns = Items("prompt").Concat(Items("response")).Select(t =>
            Turn(t.GetProperty("role").GetString()!,
                t.GetProperty("content").GetString()!)).ToList();
        var tools = aligned.TryGetProperty("tools", out var text)
            ? JsonNode.Parse($"{text}")!.AsArray() : [];
        string system = aligned.TryGetProperty("system", out var said) && $"{said}" != ""
            ? $"{said}" : DefaultSystem;
        return Row(system, tools.Select(Tool), turns, Items("images").Select(p =>
                p.ValueKind == JsonValueKind.String ? p.GetString()! : "in the row"),
            Flags(trained.GetProperty(option)).Zip(turns)
                .Where(pair => pair.Second.Item1 == "assistant").Select(pair => pair.First));

        static (string, string) Turn(string role, string content) => role switch
        {
            "observation" => ("tool", Result(content)),
            "function" =>
                ("assistant", string.Join('\n', Calls(JsonDocument.Parse(content).RootElement)
                .Select(call => Call(ToolCall.Read(call))))),
            _ => (role, content),
        };

        static IEnumerable<JsonElement> Calls(JsonElement content) =>
            content.ValueKind == JsonValueKind.Array ? content.EnumerateArray() : [content];

        static string Tool(JsonNode? tool) => PythonJson.Write(JsonSerializer.SerializeToElement(
            tool!["function"] is null
                ? new JsonObject { ["type"] = "function", ["function"] = tool.DeepClone() }
                : tool));

        IEnumerable<JsonElement> Items(string key) =>
            aligned.TryGetProperty(key, out var list) ? list.EnumerateArray() : [];
    }

    private static IEnumerable<bool> Flags(JsonElement list) =>
        list.EnumerateArray().Select(flag => flag.GetInt32() == 1);
}
