using System.Text;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// ChatML, &lt;|im_start|&gt;role\ncontent&lt;|im_end|&gt;\n for each turn. Models differ by data:
/// a system prompt put in front where the conversation has none (Qwen2), or think blocks (Qwen3):
/// the last answer gets one, an empty one if it has none, and earlier answers lose theirs;
/// functions called stand behind the answer, and their results in a user's turn.
///
/// A checkpoint says what it wants as a Jinja template. It is recognised, not run: by its markers,
/// its system prompt and its handling of thoughts. One that does anything else is refused, because
/// training on another text than inference uses would be a silent loss.
/// </summary>
public sealed partial class ChatMlFormat : TemplateFormat
{
    private const string TurnStart = "<|im_start|>", TurnEnd = "<|im_end|>";
    private const string NoThought = "<think>\n\n</think>\n\n";
    private const string Speech = "<|tts_bos|>";

    private readonly int _turnStart, _noThought;

    /// <param name="tokenizer">The checkpoint's tokenizer.</param>
    /// <param name="defaultSystem">The system prompt of conversations that begin without one; null
    /// for none.</param>
    /// <param name="thoughts">Which answers carry think blocks.</param>
    /// <param name="place">The model directory, for messages.</param>
    /// <param name="tools">How functions are written; null where the template has none.</param>
    /// <exception cref="InputException">The tokenizer lacks a token of the format.</exception>
    public ChatMlFormat(Tokenizer tokenizer, string? defaultSystem, Thoughts thoughts,
        string place = "tokenizer", ToolStyle? tools = null)
        : base(tokenizer, TurnEnd, place, tools)
    {
        (DefaultSystem, Thoughts) = (defaultSystem, thoughts);
        _turnStart = tokenizer.Require(TurnStart, place);
        _noThought = tokenizer.Encode(NoThought).Length;
        EndOfAnswer = EosId();
    }

    public string? DefaultSystem { get; }

    public Thoughts Thoughts { get; }

    private bool Thinks => Thoughts != Thoughts.None;

    public override string LlmType => "qwen";

    public override IReadOnlyList<string> Markers { get; } = [TurnStart, TurnEnd];

    private protected override int? EndOfAnswer { get; }

    private protected override string Tail => "\n";

    /// <summary>
    /// The format of a model directory: of chat_template.jinja, else of chat_template in
    /// tokenizer_config.json or chat_template.json, in transformers' order.
    /// </summary>
    /// <exception cref="InputException">No template, or one that is not recognised.</exception>
    public static ChatMlFormat Load(string directory, Tokenizer tokenizer)
    {
        var (text, file) = Template(directory, tokenizer);
        return Recognize(tokenizer, text, file, directory);
    }

    /// <summary>The Jinja template of a model directory, and where it stands.</summary>
    /// <exception cref="InputException">There is none.</exception>
    internal static (string Text, string File) Template(string directory, Tokenizer tokenizer)
    {
        string jinja = Path.Combine(directory, "chat_template.jinja");
        if (File.Exists(jinja))
            return (Encoding.UTF8.GetString(InputFile.ReadAll(jinja, 1 << 20)), jinja);
        string config = Path.Combine(directory, "tokenizer_config.json");
        if (tokenizer.ChatTemplate is { } template) return (template, config);
        string json = Path.Combine(directory, "chat_template.json");
        if (File.Exists(json))
            return (JsonInput.ReadObject(json)["chat_template"].Text(), json);
        throw new InputException($"{config}: has no chat_template, and there is no "
            + "chat_template.jinja; copy the checkpoint's own");
    }

    /// <summary>The format that a Jinja template renders.</summary>
    /// <param name="tokenizer">The checkpoint's tokenizer.</param>
    /// <param name="template">The template's text.</param>
    /// <param name="file">Where it stands, for messages.</param>
    /// <param name="place">The model directory, for messages.</param>
    /// <exception cref="InputException">A template of another kind.</exception>
    public static ChatMlFormat Recognize(
        Tokenizer tokenizer, string template, string file, string place = "tokenizer")
    {
        string? other = !template.Contains(TurnStart, StringComparison.Ordinal)
            || !template.Contains(TurnEnd, StringComparison.Ordinal)
            ? $"does not use {TurnStart} and {TurnEnd}"
            : Trims().IsMatch(template) ? "trims contents"
            : template.Contains("<|vision_start|>", StringComparison.Ordinal)
                ? "writes pictures itself" : null;
        var thoughts = ThoughtsOf(template);
        if (thoughts is null) other ??= "handles </think> in another way than Qwen3";
        if (other is not null)
            throw new InputException($"{file}: chat_template {other}; only ChatML as in Qwen2 and "
                + "Qwen3 is supported");
        var system = DefaultSystemText().Match(template);
        return new ChatMlFormat(tokenizer,
            system.Success && thoughts == Thoughts.None ? Unescape(system.Groups[1].Value) : null,
            thoughts!.Value, place,
            // Those of Qwen2.5 write arguments that are text in another way.
            thoughts == Thoughts.BehindLastQuestion ? ToolStyle.Of(template) : null);
    }

    // Qwen3's template looks for the last question; ones for talk without functions are shorter,
    // and one that asks for no role but the assistant's has only the last turn in view.
    private static Thoughts? ThoughtsOf(string template)
    {
        if (!Has("</think>")) return Thoughts.None;
        if (Has("reasoning_content") && Has("last_query_index")) return Thoughts.BehindLastQuestion;
        if (!Has("enable_thinking is false") || !Has("loop.last")
            || !Has(".split('</think>')[0].rstrip(") || !Has(".split('<think>')[-1]")) return null;
        return AsksForUser().IsMatch(template) ? Thoughts.BehindLastQuestion : Thoughts.LastTurn;

        bool Has(string part) => template.Contains(part, StringComparison.Ordinal);
    }

    /// <inheritdoc/>
    public override string Prompt(IReadOnlyList<ChatTurn> turns, bool? enableThinking = null) =>
        base.Prompt(turns) + (Thinks && enableThinking == false ? NoThought : "");

    /// <summary>A prompt whose answer is to be spoken (use_tts_template of o-4_5).</summary>
    public string SpokenPrompt(IReadOnlyList<ChatTurn> turns, bool? enableThinking = null) =>
        Prompt(turns, enableThinking) + Speech;

    private protected override string Head(string role) => $"{TurnStart}{role}\n";

    private protected override int Added(ChatTurn answer) => Thinks
        && answer.Content.StartsWith(NoThought, StringComparison.Ordinal) ? _noThought : 0;

    private protected override IEnumerable<int> OfficialStarts(int[] ids, string text)
    {
        // The script takes an empty think block for four tokens, and looks for one anywhere.
        int thought = text.Contains(NoThought, StringComparison.Ordinal) ? 4 : 0;
        int[] words = [.. Assistants(ids)];
        return from index in words
               where index > 0 && ids[index - 1] == _turnStart
               select index + 2 + (index == words[^1] ? thought : 0);
    }

    private protected override IReadOnlyList<ChatTurn> Written(IReadOnlyList<ChatTurn> turns)
    {
        var written = new List<ChatTurn>(turns.Count + 1);
        if (DefaultSystem is not null && turns.Count > 0 && turns[0].Role != "system")
            written.Add(new ChatTurn("system", DefaultSystem));
        int question = Thoughts != Thoughts.BehindLastQuestion ? turns.Count - 2
            : ToolStyle.LastQuestion(turns) is >= 0 and var last ? last : turns.Count - 1;
        for (int i = 0; i < turns.Count; i++)
        {
            if (turns[i].Role == "tool")
            {
                if (i == 0 || turns[i - 1].Role != "tool")
                    written.Add(new ChatTurn("user", ToolStyle.Results(turns.Skip(i))));
            }
            else if (Thinks && turns[i].Role == "assistant")
                written.Add(Answer(turns[i], behind: i > question, last: i == turns.Count - 1));
            else if (turns[i].Tools is { Count: > 0 } tools)
                written.Add(turns[i] with { Content = Tools!.System(turns[i].Content, tools) });
            else written.Add(turns[i]);
        }
        return written;
    }

    private ChatTurn Answer(ChatTurn turn, bool behind, bool last)
    {
        const string Open = "<think>", Close = "</think>";
        string content = turn.Content, thought = turn.Thought ?? "";
        int close = content.IndexOf(Close, StringComparison.Ordinal);
        if (close >= 0 && turn.Thought is null)
        {
            thought = content[..close].TrimEnd('\n');
            int open = thought.LastIndexOf(Open, StringComparison.Ordinal);
            thought = (open < 0 ? thought : thought[(open + Open.Length)..]).TrimStart('\n');
            content = content[(content.LastIndexOf(Close, StringComparison.Ordinal)
                + Close.Length)..]
                .TrimStart('\n');
        }
        string calls = Called(turn, content);
        if (behind && (last || thought.Length > 0))
            content = $"{Open}\n{thought.Trim('\n')}\n{Close}\n\n{content.TrimStart('\n')}";
        return turn with { Content = content + calls };
    }

    // A literal of the template: <|im_start|>system, a line end (real or escaped), the prompt.
    [GeneratedRegex("<\\|im_start\\|>system(?:\\n|\\\\n)((?:[^'\"\\\\{}]|\\\\.)+?)<\\|im_end\\|>")]
    private static partial Regex DefaultSystemText();

    [GeneratedRegex(@"\|\s*trim\b")]
    private static partial Regex Trims();

    [GeneratedRegex(@"role\b['""\]\s]*==\s*['""]user['""]")]
    private static partial Regex AsksForUser();

    private static string Unescape(string literal)
    {
        var text = new StringBuilder();
        for (int i = 0; i < literal.Length; i++)
            text.Append(literal[i] != '\\' || i + 1 == literal.Length ? literal[i]
                : literal[++i] switch { 'n' => '\n', 't' => '\t', 'r' => '\r', var c => c });
        return text.ToString();
    }
}
