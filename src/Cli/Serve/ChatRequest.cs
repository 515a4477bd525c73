using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Cli.Serve;

/// <summary>The body of POST /v1/chat/completions, as far as it is served.</summary>
internal sealed record ChatRequest
{
    private const string Place = "the request";

    private const int MostTurns = 1000, MostStops = 16;

    // Passed over: about the sender alone.
    private static readonly string[] s_harmless =
    [
        "user", "metadata", "store", "service_tier", "safety_identifier",
        "prompt_cache_key",
    ];

    public required string Model { get; init; }

    public required IReadOnlyList<PromptTurn> Turns { get; init; }

    /// <summary>What the turns show, and let hear.</summary>
    public required RequestMedia Media { get; init; }

    /// <summary>In place of the format's system prompt.</summary>
    public string? System { get; init; }

    /// <summary>Functions that may be called, each as templates write it.</summary>
    public IReadOnlyList<string> Tools { get; init; } = [];

    /// <summary>The function that the answer must call, empty for any; null where it may.</summary>
    public string? MustCall { get; init; }

    /// <summary>Whether one answer may call several times.</summary>
    public bool CallsSeveral { get; init; } = true;

    /// <summary>Whether it is about functions, which not every model's template has.</summary>
    public bool HasFunctions =>
        Tools.Count > 0 || Turns.Any(turn => turn.Role == "tool" || turn.Calls is not null);

    /// <summary>What the answer begins with, that it calls what it must.</summary>
    public string Begun(PromptFormat format) =>
        MustCall is { } name && format.Tools is { } style ? style.Opening(name) : "";

    public bool Streams { get; init; }

    /// <summary>Whether a stream ends with the numbers of tokens.</summary>
    public bool ReportsUsage { get; init; }

    public bool Thinks { get; init; }

    /// <summary>Null draws another answer each time.</summary>
    public ulong? Seed { get; init; }

    public int? MaxTokens { get; init; }

    /// <summary>Texts that end an answer, and are not part of it.</summary>
    public IReadOnlyList<string> Stops { get; init; } = [];

    public required GenerationSettings Settings { get; init; }

    /// <param name="body">JSON in UTF-8.</param>
    /// <param name="settings">What holds where the request says nothing.</param>
    /// <exception cref="InputException">Not such a request, or it asks for what is not
    /// served.</exception>
    public static ChatRequest Read(
        ReadOnlyMemory<byte> body, GenerationSettings settings)
    {
        JsonValue json = JsonInput.Parse(Place, body);
        if (!json.IsObject) throw json.Expected("an object");
        var media = new RequestMedia();
        (string? system, List<PromptTurn> turns) = Messages(json["messages"], media);
        var (tools, mustCall) = RequestTools.Read(json);
        var request = new ChatRequest
        {
            Model = json.Find("model")?.Text() ?? "",
            Turns = turns,
            Media = media,
            System = system,
            Tools = tools,
            MustCall = mustCall,
            CallsSeveral = mustCall is not { Length: > 0 },
            Settings = settings,
        };
        foreach (var (name, value) in json.Members())
        {
            if (value.Element.ValueKind == global::System.Text.Json.JsonValueKind.Null) continue;
            switch (name)
            {
                case "model" or "messages" or "tools" or "tool_choice":
                    break;
                case "stream":
                    request = request with { Streams = value.Bool() };
                    break;
                case "max_tokens" or "max_completion_tokens":
                    request = request with { MaxTokens = value.Int(1) };
                    break;
                case "stream_options":
                    request = request with
                    {
                        ReportsUsage = value.Find("include_usage")?.Bool() ?? false,
                    };
                    break;
                case "seed":
                    request = request with { Seed = unchecked((ulong)value.Long()) };
                    break;
                case "stop":
                    request = request with { Stops = TextsOf(value) };
                    break;
                case "enable_thinking":
                    request = request with { Thinks = value.Bool() };
                    break;
                case "n":
                    Only(value, value.Number() == 1, "1");
                    break;
                case "frequency_penalty" or "presence_penalty":
                    Only(value, value.Number() == 0,
                        "0: repetition_penalty does what they are for");
                    break;
                case "logprobs":
                    Only(value, !value.Bool(), "false");
                    break;
                case "parallel_tool_calls":
                    request = request with { CallsSeveral = value.Bool() && request.CallsSeveral };
                    break;
                case "functions":
                    Only(value, !value.Items().Any(), "none: tools has them");
                    break;
                case "response_format":
                    Only(value, value["type"].Text() == "text", "{\"type\": \"text\"}");
                    break;
                default:
                    if (Choice(request.Settings, name, value) is { } chosen)
                        request = request with { Settings = chosen };
                    else if (!s_harmless.Contains(name))
                        throw value.Error("is not known here");
                    break;
            }
        }

        if (request is { MustCall: not null, Thinks: true })
            throw json["tool_choice"].Expected(
                "\"auto\" or \"none\" beside enable_thinking: a call that must come comes first");
        return request with { Settings = request.Settings.Checked() };
    }

    private static GenerationSettings? Choice(
        GenerationSettings settings, string name, JsonValue value) => name switch
        {
            // As OpenAI has it, and as the drawing of the official chat() has not: 0 is greedy.
            "temperature" => value.Number(0, 1e6) is > 0 and var t
                ? settings with { DoSample = true, Temperature = t }
                : settings with { DoSample = false, Temperature = 1 },
            "top_p" => settings with { TopP = value.Number(0, 1) },
            "top_k" => settings with { TopK = value.Int(0) },
            "repetition_penalty" => settings with { RepetitionPenalty = value.Number(0, 1e6) },
            _ => null,
        };

    private static void Only(JsonValue value, bool holds, string served)
    {
        if (!holds) throw value.Expected(served);
    }

    private static IReadOnlyList<string> TextsOf(JsonValue value)
    {
        string[] texts = value.IsText ? [value.Text()] : [.. value.Items().Select(v => v.Text())];
        return texts.Length <= MostStops && texts.All(text => text.Length > 0) ? texts
            : throw value.Error($"has {texts.Length} texts, expected up to {MostStops}, none empty");
    }

    private static (string? System, List<PromptTurn> Turns) Messages(
        JsonValue messages, RequestMedia media)
    {
        string? system = null;
        var turns = new List<PromptTurn>();
        var functions = new RequestTools();
        foreach (JsonValue message in messages.Items())
        {
            if (turns.Count == MostTurns)
                throw messages.Error($"has more than {MostTurns} turns");
            string role = message["role"].Text();
            bool isSystem = role is "system" or "developer";
            string before = turns.Count > 0 ? turns[^1].Role : "assistant";
            if (!isSystem && !(role == "tool" ? turns.Count > 0 && before != "user"
                : role == (before == "assistant" ? "user" : "assistant")))
                throw message["role"].Expected("user and assistant in turn, tool for results "
                    + "behind an answer's calls, and one system turn in front at most");
            if (isSystem && (turns.Count > 0 || system is not null))
                throw message["role"].Error("is a system turn, expected one, in front");
            IReadOnlyList<ToolCall>? calls = functions.Calls(message, role);
            PromptPart[] parts = calls is not null && message.Find("content") is null
                ? [""] : Parts(message["content"], role, media);
            if (isSystem) system = string.Join('\n', parts.Select(part => part.Text));
            else if (role == "tool")
                turns.Insert(functions.PlaceOfResult(message, turns),
                    new PromptTurn(role, [string.Concat(parts.Select(part => part.Text))]));
            else turns.Add(new PromptTurn(role, parts) { Calls = calls });
        }

        return turns.Count > 0 && turns[^1].Role != "assistant" ? (system, turns)
            : throw messages.Error("ends without a question of the user, or a result");
    }

    private static PromptPart[] Parts(JsonValue content, string role, RequestMedia media)
    {
        if (content.IsText) return [content.Text()];
        PromptPart[] parts = [.. content.Items().Select(part => part["type"].Text() == "text"
            ? part["text"].Text()
            : (role == "user" ? media.Take(part) : null) ?? throw part["type"].Expected(
                "text, or image_url, video_url or input_audio in a turn of the user"))];
        return parts.Length > 0 ? parts : throw content.Error("is empty");
    }
}
