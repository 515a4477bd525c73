using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;
using static MiniCpmNative.Engine.Data.RowValues;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// What a format calls things: where the turns stand, or question, answer and history, where the
/// pictures, and who says what. A file has one format, that of its first row.
/// </summary>
/// <param name="Name">The format, for messages; null is the official one.</param>
internal sealed record RowColumns(string? Name)
{
    private static readonly string[] s_turnLists = ["messages", "conversations", "conversation"];

    // ms-swift's names; it compares without regard to case.
    private static readonly string[] s_questions =
        ["query", "prompt", "input", "instruction", "question", "problem"];

    private static readonly string[] s_answers =
    [
        "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution",
        "text", "completion", "content",
    ];

    /// <summary>Key of the list of turns; null where a row is question and answer.</summary>
    public string? Turns { get; init; }

    public string Role { get; init; } = "role";

    public string Content { get; init; } = "content";

    /// <summary>Turns are objects of a question and an answer each.</summary>
    public bool Pairs { get; init; }

    /// <summary>Role in the file -> user, assistant, system, call, or tool, a call's
    /// result.</summary>
    public IReadOnlyDictionary<string, string> Roles { get; init; } = new Dictionary<string, string>
    {
        ["user"] = "user",
        ["human"] = "user",
        ["assistant"] = "assistant",
        ["gpt"] = "assistant",
        ["bot"] = "assistant",
        ["system"] = "system",
        ["tool"] = "tool",
        ["tool_call"] = "call",
        ["function_call"] = "call",
        ["tool_response"] = "tool",
        ["function_response"] = "tool",
        ["observation"] = "tool",
        ["observations"] = "tool",
    };

    public IReadOnlyList<string> Pictures { get; init; } = ["images", "image"];

    public IReadOnlyList<string> Videos { get; init; } = ["videos", "video"];

    public IReadOnlyList<string> System { get; init; } = ["system", "system_prompt"];

    /// <summary>Functions that may be called.</summary>
    public IReadOnlyList<string> Tools { get; init; } = ["tools"];

    public string? Question { get; init; }

    /// <summary>Stands behind the question, with a line end between.</summary>
    public string? Input { get; init; }

    public string? Answer { get; init; }

    public string? History { get; init; }

    public bool IsOfficial => Name is null;

    /// <summary>The official format of MiniCPM-V's finetune/.</summary>
    public static RowColumns Official { get; } = new((string?)null)
    {
        Turns = "conversations",
        Pictures = ["image"],
        System = ["system"],
        Roles = new Dictionary<string, string>
        {
            ["user"] = "user",
            ["assistant"] = "assistant",
            ["system"] = "system",
            ["tool"] = "tool",
        },
    };

    /// <summary>Whether a key has a meaning here.</summary>
    public bool Uses(string key) => key == Turns || key == Question || key == Input || key == Answer
        || key == History || Pictures.Contains(key) || Videos.Contains(key)
        || System.Contains(key) || Tools.Contains(key);

    /// <summary>The format that a row has; null where it has none.</summary>
    /// <exception cref="FormatException">Two of its keys mean the same.</exception>
    public static RowColumns? Of(JsonElement row)
    {
        foreach (string key in s_turnLists)
        {
            var list = Unfolded(row.Member(key));
            if (list.ValueKind != JsonValueKind.Array) continue;
            var turn = list.EnumerateArray()
                .FirstOrDefault(t => t.ValueKind == JsonValueKind.Object);
            if (turn.ValueKind == JsonValueKind.Object) return OfTurns(key, row, list, turn);
        }

        string? question = Find(row, s_questions, out string? another);
        if (question is null) return null;
        string? answer = Find(row, s_answers, out string? second);
        string? instruction = Find(row, ["instruction"], out _),
            input = Find(row, ["input"], out _);
        bool alpaca = instruction is not null && (input is not null || another is null);
        if (alpaca) another = Find(row, [.. s_questions.Except(["instruction", "input"])], out _);
        if ((another ?? second) is not null)
            throw new FormatException(another is not null
                ? $"both \"{(alpaca ? instruction : question)}\" and \"{another}\" could be the "
                    + "question: rename or take out the one that is not"
                : $"both \"{answer}\" and \"{second}\" could be the answer: rename or take out the "
                    + "one that is not");
        return new RowColumns(alpaca ? "Alpaca rows (instruction, input, output)"
            : $"questions and answers ({question}, {answer ?? "no answer"})")
        {
            Question = alpaca ? instruction : question,
            Input = alpaca ? input ?? "input" : null,
            Answer = answer ?? (alpaca ? "output" : "response"),
            History = "history",
        };
    }

    private static RowColumns OfTurns(
        string key, JsonElement row, JsonElement list, JsonElement turn)
    {
        bool said = turn.TryGetProperty("value", out _);
        string role = turn.TryGetProperty("from", out _) ? "from" : "role";
        string content = said && !turn.TryGetProperty("content", out _) ? "value" : "content";
        bool pairs = !turn.TryGetProperty(role, out _)
            && (turn.TryGetProperty("human", out _) || turn.TryGetProperty("user", out _));
        bool images = row.TryGetProperty("images", out _);
        if (key == "conversations" && role == "role" && !said && !images && !pairs) return Official;
        bool parts = list.EnumerateArray().Any(
            item => item.Member(content).ValueKind == JsonValueKind.Array);
        return new RowColumns(pairs ? $"pairs of question and answer ({key})"
            : role == "from" && !images && row.TryGetProperty("image", out _)
                ? "LLaVA rows (image, from, value)"
            : role == "from" ? "ShareGPT rows (from, value)"
            : parts ? "OpenAI chat messages (contents of parts)"
            : $"ms-swift rows ({key}, images)")
        {
            Turns = key,
            Role = role,
            Content = content,
            Pairs = pairs,
        };
    }

    // The first of the row's keys that is among the names, and another one if there is; nulls are
    // absent.
    private static string? Find(JsonElement row, string[] names, out string? another)
    {
        string? found = null;
        another = null;
        foreach (var property in row.EnumerateObject())
        {
            if (property.Value.ValueKind == JsonValueKind.Null
                || !names.Contains(property.Name, StringComparer.OrdinalIgnoreCase)) continue;
            if (found is null) found = property.Name;
            else another ??= property.Name;
        }

        return found;
    }
}
