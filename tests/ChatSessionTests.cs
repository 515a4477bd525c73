using System.Text.Json;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Generate;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Conversations: against the official chat(), over the cache of the turns before, and as cpmx chat
/// shows them; streamed text against transformers' TextStreamer.
/// </summary>
[TestFixture]
public sealed class ChatSessionTests
{
    private static string Model { get; } = Path.Combine(ReferenceFile.Root, "v26", "model");

    private static string Adapter { get; } =
        Path.Combine(ReferenceFile.Root, "v26", "adapters", "trained_lora_only");

    private static string Picture(string name) =>
        Path.Combine(ReferenceFile.Root, "v26", "data", "images", name);

    // Each turn goes on from the cache of the turns before it.
    [Test]
    public void AConversationIsThatOfTheOfficialChat()
    {
        using AskedModel model = GenerationCase.Open(Model);
        ChatSession session = Session(model, 10);
        session.Show(Picture("p0.png"));
        int turns = 0;
        foreach (JsonElement line in ReferenceText.Json("generation/chat.json")
            .GetProperty("conversation").EnumerateArray())
        {
            ChatAnswer answer = session.Ask(
                line.GetProperty("question").GetString()!, _ => { }, () => true);
            Assert.That(answer.Text, Is.EqualTo(line.GetProperty("answer").GetString()));
            Assert.That(answer.PromptTokens,
                Is.EqualTo(line.GetProperty("prompt_ids").GetArrayLength()));
            turns++;
        }

        Assert.That(turns, Is.EqualTo(3));
    }

    [Test]
    public void StreamedAnswersAreThoseOfTheOfficialChat()
    {
        using AskedModel model = GenerationCase.Open(Model);
        var generator = new Generator(model.Model);
        JsonElement prompts = ReferenceText.Json("generation/prompts.json");
        int seen = 0;
        foreach (JsonElement line in ReferenceText.Json("generation/chat.json")
            .GetProperty("answers").EnumerateArray())
        {
            string name = line.GetProperty("case").GetString()!;
            // Of the batch, prompts.json has the parts elsewhere.
            if (!prompts.TryGetProperty(name, out var prompt)) continue;
            string how = line.GetProperty("how").GetString()!;
            GenerationInput input = GenerationCase.Input(model, prompt.GetProperty("case"));
            // Its stream passes no mask: "!" is seen there, as it is here.
            if (how != "stream") input = GenerationCase.Unmasked(input);
            var text = new TextStream(model.Rows.Tokenizer);
            var pieces = new List<string>();
            GeneratedTokens tokens = generator.Run([input], new GenerationSettings
            {
                MaxNewTokens = line.GetProperty("new_tokens").GetInt32(),
                StopIds = model.Rows.Prompts.StopIds,
                NumBeams = how == "beams" ? 3 : 1,
                RepetitionPenalty = how == "beams" ? 1.2 : 1.05,
            }, (_, id) =>
            {
                pieces.Add(text.Add(id));
                return true;
            })[0];
            Assert.That(tokens.Ids, Is.EqualTo(ReferenceText.Ints(line.GetProperty("ids"))),
                $"{name}, {how}");
            seen++;
            if (how != "stream") continue;
            pieces.Add(text.End());
            if (line.TryGetProperty("answer_without_streaming", out var whole))
                Assert.That(PythonText.Strip(string.Concat(pieces)),
                    Is.EqualTo(whole.GetString()), name);
        }

        Assert.That(seen, Is.GreaterThanOrEqualTo(24));
    }

    [Test]
    public void PiecesOfTextAreThoseOfTextStreamer()
    {
        int same = 0, mended = 0;
        foreach (JsonElement line in ReferenceText.Lines("generation/stream.jsonl"))
        {
            string name = line.GetProperty("tokenizer").GetString()!;
            string folder = "tokenizers/" + name.Split('.')[0];
            if (!ReferenceText.Has(folder + "/tokenizer.model"))
            {
                if (!ReferenceText.Has(folder + "/tokenizer.json")) continue;
            }
            else if (!ReferenceText.Has(folder + "/tokenizer.json"))
            {
                name = folder["tokenizers/".Length..] + ".slow";
            }

            var text = new TextStream(TokenizerTests.Load(name));
            string[] pieces = [.. ReferenceText.Ints(line.GetProperty("ids")).Select(text.Add),
                text.End()];
            if (line.TryGetProperty("plain_decoded_at_once", out var whole))
            {
                // transformers loses spaces between its pieces here. Random ids can change how the
                // text before them is decoded, spaces too, when it is told already.
                string told = string.Concat(pieces), all = whole.GetString()!;
                if (line.GetProperty("kind").GetString() == "text")
                    Assert.That(told, Is.EqualTo(all), line.ToString());
                else Assert.That(Bare(told), Is.EqualTo(Bare(all)), line.ToString());
                mended++;
                continue;
            }

            Assert.That(pieces, Is.EqualTo(line.GetProperty("plain").EnumerateArray()
                .Select(piece => piece.GetString()!)), line.ToString());
            same++;
        }

        Assert.That(same, Is.GreaterThan(500));
        Assert.That(mended, Is.GreaterThan(10));

        static string Bare(string text) => string.Concat(text.Where(c => !char.IsWhiteSpace(c)));
    }

    [Test]
    public void ACacheThatGoesOnGivesTheAnswersOfOneThatIsNew()
    {
        using AskedModel model = GenerationCase.Open(Model, Adapter);
        ChatSession going = Session(model, 8);
        string[] questions = ["What is this?", "And this?", "Sure?"];
        var before = new List<string>();
        foreach (var (i, question) in questions.Index())
        {
            if (i < 2) going.Show(Picture($"p{i}.png"));
            before.Add(going.Ask(question, _ => { }, () => true).Text);
            // The same conversation in one that begins with it.
            var prompt = new List<Engine.Data.PromptTurn>();
            var maker = new PromptMaker(model.Model.Spec, model.Rows);
            List<PromptPicture> pictures = [];
            for (int turn = 0; turn <= i; turn++)
            {
                if (turn < 2) pictures.Add(maker.Open(Picture($"p{turn}.png")));
                prompt.Add(new("user", turn < 2 ? [turn, questions[turn]] : [questions[turn]]));
                if (turn < i) prompt.Add(new("assistant", [before[turn]]));
            }

            GeneratedTokens anew = new Generator(model.Model).Run(
                [maker.Make(prompt, pictures)], Settings(model, 8))[0];
            Assert.That(before[i], Is.EqualTo(
                model.Rows.Tokenizer.Decode(anew.Ids).Trim()), question);
        }
    }

    [Test]
    public void LinesThatComeInAreAnsweredWithAndWithoutTheAdapter()
    {
        string plain = Chat("What is in the picture?\n", null, "--image", Picture("p0.png"));
        string tuned = Chat("What is in the picture?\n", Adapter, "--image", Picture("p0.png"));
        Assert.That(tuned, Is.Not.EqualTo(plain));
        Assert.That(plain.TrimEnd(), Is.EqualTo("signhohohohohohohoho"),
            "chat's first nine tokens");
        string both = Chat($"/image {Picture("p0.png")}\nWhat is in the picture?\n/base\n"
            + "What is in the picture?\n/reset\n", Adapter);
        string[] lines = both.TrimEnd().Split('\n');
        Assert.That(lines[0], Is.EqualTo(tuned.TrimEnd()));
        Assert.That(lines[1], Is.EqualTo(plain.TrimEnd()));
    }

    [TestCase("/imagine x\n", "/imagine: no such command; /help lists them")]
    [TestCase("/image none.png\n", "none.png")]
    [TestCase("/image\n", "A file's name is missing")]
    [TestCase("/base\n", "/base: there is no adapter to leave out")]
    public void WhatCannotBeDoneIsOneLine(string input, string expected) => Assert.That(
        () => Chat(input, null), Throws.TypeOf<InputException>().With.Message.Contain(expected));

    [TestCase("<think>\nso\n</think>\n\nYes.", "Yes.")]
    [TestCase("<think>\n\n</think>\n\nYes <think> x", "Yes <think> x")]
    [TestCase(" <think>never ends", "")]
    [TestCase(" <thin air ", "<thin air ")]
    [TestCase("", "")]
    public void ThoughtsAreFolded(string text, string expected)
    {
        for (int size = 1; size <= text.Length + 1; size++)
        {
            var fold = new ThoughtFold();
            string shown = string.Concat(text.Chunk(size).Select(p => fold.Add(new string(p))))
                + fold.End();
            Assert.That(shown, Is.EqualTo(expected), $"{size}");
        }
    }

    private static ChatSession Session(AskedModel model, int tokens) => new(
        model, new PromptMaker(model.Model.Spec, model.Rows), Settings(model, tokens));

    private static GenerationSettings Settings(AskedModel model, int tokens) => new()
    {
        MaxNewTokens = tokens,
        StopIds = model.Rows.Prompts.StopIds,
        RepetitionPenalty = 1.05,
    };

    private static string Chat(string input, string? adapter, params string[] more)
    {
        var output = new StringWriter();
        string[] args = [Model, "--device", "cpu", "--do_sample", "false",
            "--max_new_tokens", "9", .. more,
            .. adapter is null ? (string[])[] : ["--adapter", adapter]];
        int code = ChatCommand.Run(args, help: false, new StringReader(input), output,
            new StringWriter(), new Runners(), terminal: false);
        Assert.That(code, Is.Zero);
        return output.ToString();
    }
}
