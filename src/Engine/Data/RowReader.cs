using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;
using static MiniCpmNative.Engine.Data.RowValues;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Rows of one file as this program has them: turns, pictures, boxes, whatever they are called in
/// the file. What would be lost, or means something else elsewhere, is refused by name.
/// </summary>
internal sealed class RowReader(string file, RowColumns columns, RowOptions options)
{
    // Where other tools put media; a row that has them would lose its pictures unseen.
    private static readonly string[] s_otherKeys =
        ["images", "picture", "pictures", "video", "videos"];

    // Beside a row's pictures they say where these come from; in a row without any they are them.
    private static readonly string[] s_likelyPictures =
    [
        "img", "imgs", "img_path", "image_path", "image_paths", "image_file", "image_files",
        "image_url", "image_urls", "image_base64",
    ];

    // What changes a row's meaning in other tools: passed over, it would be trained without.
    private static readonly string[] s_otherMeanings =
    [
        "system", "tools", "functions", "history", "query", "instruction", "response", "messages",
        "rejected", "rejected_response", "rejected_messages", "rejected_images", "chosen",
        "solution", "label", "kto_tag", "loss", "loss_scale", "margin", "image", "conversations",
        "msgs",
    ];

    private static readonly string[] s_otherTurnMeanings =
        ["function_call", "reasoning_content", "images", "image"];

    private readonly string[] _media = [.. s_otherKeys.Where(key => !columns.Uses(key))];
    private readonly string[] _likely = [.. s_likelyPictures.Where(key => !columns.Uses(key))];
    private readonly string[] _meanings = [.. s_otherMeanings.Where(key => !columns.Uses(key))];

    public RowColumns Columns => columns;

    /// <summary>Reads a row; id and turn (from 1) are known to whoever catches.</summary>
    /// <exception cref="FormatException">The row cannot be used.</exception>
    public Row Read(int number, int place, JsonElement row, ref string? id, ref int? turn)
    {
        if (row.ValueKind != JsonValueKind.Object)
            throw new FormatException($"is {Kind(row)}, expected an object");
        id = Id(row.Member("id"));
        foreach (string key in _media)
            if (!row.Member(key).SaysNothing())
                throw key is "images" or "picture" or "pictures" ? NotHere(key)
                    : new FormatException(
                    $"key \"{key}\" is not used here: the columns that the file was given name "
                        + "another, or none, for videos");
        MustNotHave(row, _meanings);
        string[]? tools = null;
        foreach (string key in columns.Tools) tools ??= RowTools.Of(row, key);
        var (names, pictures) = columns.IsOfficial
            ? RowPictures.Official(row.Member("image")) : (PictureNames.None, []);
        var turns = new List<ChatTurn>();
        RowPicture[] sounds = RowPictures.Sounds(row);
        var shown = new RowParts();
        if (System(row) is { Length: > 0 } system) turns.Add(new ChatTurn("system", system));
        string[] references = References(row.Member("references"));
        if (columns.Turns is not null) AddTurns(row, turns, shown, ref turn);
        else AddQuestion(row, turns, ref references);
        if (tools is not null)
        {
            if (turns.Count == 0 || turns[0].Role != "system")
                turns.Insert(0, new ChatTurn("system", ""));
            turns[0] = turns[0] with { Tools = tools };
        }

        if (!columns.IsOfficial)
        {
            if (columns.Pictures.Where(key => !row.Member(key).SaysNothing()).Skip(1).Any())
                throw new FormatException("has pictures under both "
                    + string.Join(" and ", columns.Pictures.Select(key => $"\"{key}\"")));
            RowPicture[] heard = [.. shown.Sounds];
            if (heard.Length > 0 && sounds.Length > 0)
                throw new FormatException("has sounds in the parts of its turns and beside them "
                    + "too: in which order is not said");
            if (heard.Length > 0) sounds = heard;
            RowPicture[] listed = [.. columns.Pictures.SelectMany(
                key => RowPictures.Listed(row.Member(key)))];
            if (listed.Length > 0 && shown.Pictures.Count > 0)
                throw new FormatException("has pictures in the parts of its turns and in "
                    + $"\"{columns.Pictures[0]}\" too: in which order is not said");
            pictures = shown.Pictures.Count > 0 ? [.. shown.Pictures] : listed;
            names = pictures.Length switch
            {
                0 => PictureNames.None,
                1 => PictureNames.Single,
                _ => PictureNames.Listed,
            };
        }

        if (pictures.Length == 0)
            foreach (string key in _likely)
                if (!row.Member(key).SaysNothing()) throw NotHere(key);
        RowVideo[] videos = RowVideo.Read(row, columns.Videos);
        if (videos.Length > 0 && shown.Videos.Count > 0)
            throw new FormatException("has videos in the parts of its turns and in \"videos\" too: "
                + "in which order is not said");
        if (shown.Videos.Count > 0) videos = [.. shown.Videos];
        Check(turns, sounds.Length > 0, ref turn);
        var objects = Grounding.Read(row.Member("objects"));
        if (objects is null) MustNotAsk(turns, ref turn);
        return new Row(file, number, id, names, pictures, turns)
        {
            Place = place,
            References = references,
            Sounds = sounds,
            // Where their frames will begin.
            Videos = [.. videos.Select(video => video with { First = pictures.Length })],
            Objects = objects,
        };
    }

    private FormatException NotHere(string key) => new($"key \"{key}\" is not used here; pictures "
        + $"belong in \"{(columns.Pictures.Count > 0 ? columns.Pictures[0] : "image")}\"");

    // Without boxes to fill in, the tags would be learned as they stand.
    private static void MustNotAsk(List<ChatTurn> turns, ref int? turn)
    {
        for (int i = 0; i < turns.Count; i++)
            foreach (string tag in Grounding.Tags)
                if (turns[i].Texts.Any(text => text.Contains(tag, StringComparison.Ordinal)))
                {
                    turn = i + 1;
                    throw new FormatException(
                        $"has the tag {tag}, but the row has no \"objects\" to fill it from");
                }
    }

    private static void MustNotHave(JsonElement of, string[] keys)
    {
        foreach (string key in keys)
            if (!of.Member(key).SaysNothing())
                throw new FormatException($"key \"{key}\" is not used here, and without it the row "
                    + "would mean something else: take the key out, or put what it says into the "
                    + "turns' texts");
    }

    private string? System(JsonElement row)
    {
        string? system = null;
        foreach (string key in columns.System)
        {
            var value = row.Member(key);
            if (value.IsNull()) continue;
            system = value.Text()
                ?? throw new FormatException($"\"{key}\" is {Kind(value)}, expected text");
        }

        return system;
    }

    private static string[] References(JsonElement list)
    {
        if (list.IsNull()) return [];
        return list.ValueKind == JsonValueKind.Array
            && list.EnumerateArray().Select(text => text.Text()).ToArray() is { Length: > 0 } texts
            && !texts.Contains(null) ? texts.OfType<string>().ToArray() : throw new FormatException(
                $"\"references\" is {Kind(list)}, expected a list of right answers");
    }

    private void AddTurns(
        JsonElement row, List<ChatTurn> turns, RowParts shown, ref int? turn)
    {
        string key = columns.Turns!;
        var list = Unfolded(row.Member(key));
        if (list.IsNull()) throw new FormatException($"\"{key}\" is missing" + Instead(row));
        if (list.ValueKind != JsonValueKind.Array)
            throw new FormatException($"\"{key}\" is {Kind(list)}, expected a list of turns");
        int least = options.Asked || columns.Pairs ? 1 : 2, count = list.GetArrayLength();
        if (count < least)
            throw new FormatException($"\"{key}\" has {count} turn(s), expected at least {least}");
        var functions = new RowTools();
        // Enumerated: an index walks from the start each time.
        foreach (var item in list.EnumerateArray())
        {
            turn = (turn ?? 0) + 1;
            if (item.ValueKind != JsonValueKind.Object)
                throw new FormatException($"is {Kind(item)}, expected {{\"{columns.Role}\", "
                    + $"\"{columns.Content}\"}}");
            if (columns.Pairs) AddPair(item, turns);
            else AddTurn(item, turns, shown, functions, first: turn == 1);
        }

        turn = null;
    }

    // What a row without turns has instead: a wrong key, or rows inside.
    private static string Instead(JsonElement row)
    {
        string[] keys = [.. row.EnumerateObject().Select(member => member.Name)];
        if (keys.Length == 0) return "";
        return ": the row has only "
            + Messages.List([.. keys.Select(key => $"\"{Messages.OneLine(key)}\"")])
            + (row.EnumerateObject().Any(member => member.Value.Items()
                .Any(item => item.ValueKind == JsonValueKind.Object))
                ? "; where the rows stand under a key, write their list alone" : "");
    }

    private void AddTurn(JsonElement item, List<ChatTurn> turns, RowParts shown,
        RowTools functions, bool first)
    {
        string said = TextOf(item, columns.Role);
        MustNotHave(item, s_otherTurnMeanings);
        if (!columns.Roles.TryGetValue(said, out string? role))
            throw new FormatException($"role is {Messages.Quote(said)}, expected "
                + Names("user") + " or " + Names("assistant"));
        if (role == "system")
        {
            if (!first)
                throw new FormatException("role is \"system\": only the first turn can be");
            if (turns.Count > 0)
                throw new FormatException($"has a system turn and \"{columns.System[0]}\" too");
        }

        bool? trained = role is "assistant" or "call"
            ? Flag(item, "loss") ?? Flag(item, "loss_scale") ?? Flag(item, "weight") : null;
        var value = item.Member(columns.Content);
        if (role == "call")
        {
            AddCalls(functions.Calls(value) ?? throw new FormatException(
                $"\"{columns.Content}\" has no call, expected {{\"name\", \"arguments\"}}"),
                trained, turns);
            return;
        }

        var calls = functions.Calls(item.Member("tool_calls"));
        if (calls is not null && role != "assistant")
            throw new FormatException("has \"tool_calls\", which only an answer can have");
        string content = calls is not null && value.IsNull() ? "" : Contents(value, shown);
        // An empty system text is as good as none.
        if (role == "system" && content.Length == 0) return;
        if (role == "tool")
            turns.Insert(functions.PlaceOfResult(turns.Count, turns.LastOrDefault()?.Role,
                item.Member("tool_call_id").Text()), new ChatTurn("tool", content));
        else turns.Add(new ChatTurn(role, content, Calls: calls) { Trained = trained });

        string Names(string wanted) => string.Join(" or ", columns.Roles
            .Where(pair => pair.Value == wanted).Select(pair => $"\"{pair.Key}\"").Take(2));
    }

    // Calls that follow an answer, or each other, are one answer.
    private static void AddCalls(
        IReadOnlyList<ToolCall> calls, bool? trained, List<ChatTurn> turns)
    {
        if (turns.Count == 0 || turns[^1].Role != "assistant")
            turns.Add(new ChatTurn("assistant", "", Calls: calls) { Trained = trained });
        else if (turns[^1].Trained != trained)
            throw new FormatException("calls belong to the answer before them, of which another "
                + "\"loss\" is said");
        else turns[^1] = turns[^1] with { Calls = [.. turns[^1].Calls ?? [], .. calls] };
    }

    private static void AddPair(JsonElement item, List<ChatTurn> turns)
    {
        string Of(string one, string other) =>
            TextOf(item, item.TryGetProperty(one, out _) ? one : other);
        turns.Add(new ChatTurn("user", Of("human", "user")));
        turns.Add(new ChatTurn("assistant", Of("assistant", "gpt")));
    }

    private string Contents(JsonElement content, RowParts shown)
    {
        if (content.Text() is { } text) return text;
        if (content.ValueKind == JsonValueKind.Undefined)
            throw new FormatException($"\"{columns.Content}\" is missing");
        if (columns.IsOfficial || content.ValueKind != JsonValueKind.Array)
            throw new FormatException(
                $"\"{columns.Content}\" is {Kind(content)}, expected text");
        return shown.Text(content);
    }

    private void AddQuestion(JsonElement row, List<ChatTurn> turns, ref string[] references)
    {
        if (columns.History is { } history) AddHistory(row, history, turns);
        string question = Optional(row, columns.Question!);
        string input = columns.Input is { } key ? Optional(row, key) : "";
        if (row.Member(columns.Question!).IsNull() && input.Length == 0)
            throw new FormatException($"\"{columns.Question}\" is missing");
        turns.Add(new ChatTurn("user",
            question + (question.Length > 0 && input.Length > 0 ? "\n" : "") + input));
        var answer = row.Member(columns.Answer!);
        if (answer.IsNull() && options.Asked) return;
        // Several right answers: the first is learned, the others count in scores.
        if (answer.ValueKind == JsonValueKind.Array && answer.GetArrayLength() > 0
            && answer.EnumerateArray().All(text => text.Text() is not null))
        {
            string[] all = [.. answer.EnumerateArray().Select(text => text.Text()!)];
            turns.Add(new ChatTurn("assistant", all[0]));
            references = [.. references, .. all[1..]];
            return;
        }

        turns.Add(new ChatTurn("assistant", TextOf(row, columns.Answer!)));
    }

    private static void AddHistory(JsonElement row, string key, List<ChatTurn> turns)
    {
        var list = Unfolded(row.Member(key));
        if (list.SaysNothing()) return;
        if (list.ValueKind != JsonValueKind.Array)
            throw new FormatException($"\"{key}\" is {Kind(list)}, expected a list of "
                + "pairs (in a table, as JSON)");
        foreach (var pair in list.EnumerateArray())
        {
            if (pair.ValueKind != JsonValueKind.Array || pair.GetArrayLength() != 2
                || pair[0].Text() is not { } question || pair[1].Text() is not { } answer)
                throw new FormatException(
                    $"\"{key}\" has what is no pair of two texts, question and answer");
            turns.Add(new ChatTurn("user", question));
            turns.Add(new ChatTurn("assistant", answer));
        }
    }

    private static string Optional(JsonElement row, string key) =>
        row.Member(key).IsNull() ? "" : TextOf(row, key);

    // The order of the roles, and which answers are learned.
    private void Check(List<ChatTurn> turns, bool hears, ref int? turn)
    {
        int first = turns.Count > 0 && turns[0].Role == "system" ? 1 : 0;
        if (turns.Count == first) throw new FormatException("has no question");
        if (turns[first].Role != "user")
        {
            turn = first + 1;
            throw new FormatException($"role is \"{turns[first].Role}\", the first turn must be "
                + "the user's");
        }

        int question = turns.FindLastIndex(item => item.Role is "user" or "tool");
        bool answered = false, learned = false;
        for (int i = first; i < turns.Count; i++)
        {
            if (turns[i].Role == "tool") continue;
            if (!columns.IsOfficial && i > first && (turns[i].Role == turns[i - 1].Role
                || (turns[i].Role == "user" && turns[i - 1].Role == "tool")))
            {
                turn = i + 1;
                throw new FormatException("two turns in a row are the "
                    + (turns[i].Role == "user" ? "user's" : "assistant's")
                    + ": ms-swift would join them, LLaMA-Factory leave the row out; join them");
            }

            if (turns[i].Role == "user")
            {
                if (!hears && turns[i].Content.Contains(SoundText.Tag, StringComparison.Ordinal))
                {
                    turn = i + 1;
                    throw new FormatException(
                        $"has the tag {SoundText.Tag}, but the row has no \"audio\"");
                }
                if (!columns.IsOfficial
                    && turns[i].Content.Contains("<img>", StringComparison.Ordinal))
                {
                    turn = i + 1;
                    throw new FormatException("has an <img> tag, which ms-swift reads as a "
                        + "picture: write <image>, and the path into \"images\"");
                }

                continue;
            }

            answered = true;
            bool trained = turns[i].Trained ?? (!options.LastOnly || i > question);
            learned |= trained;
            if (turns[i].Trained != trained) turns[i] = turns[i] with { Trained = trained };
        }

        if (options.Asked) return;
        if (!answered)
            throw new FormatException("no turn has role \"assistant\": nothing to learn");
        if (!learned) throw new FormatException(options.LastOnly
            ? "no answer is learned: train_on=last wants one behind the last question"
            : "no answer is learned: each has \"loss\": false");
    }
}
