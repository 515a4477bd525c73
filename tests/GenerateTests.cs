using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Answers of the reference models against their official chat(): greedy, with a penalty, beams,
/// with adapters, in batches, and what the first token is chosen from.
/// </summary>
[TestFixture]
public sealed class GenerateTests
{
    private static string Model(string family) =>
        Path.Combine(ReferenceFile.Root, family, "model");

    [TestCase("v26", 9)]
    [TestCase("v4", 4)]
    [TestCase("v45", 4)]
    public void AnswersAreThoseOfTheOfficialChat(string family, int least)
    {
        JsonElement all = ReferenceText.Json($"generate/{family}.json");
        JsonElement prompts = ReferenceText.Json("generation/prompts.json");
        int seen = 0;
        foreach (var cases in all.GetProperty("cases").EnumerateArray()
            .GroupBy(c => c.GetProperty("adapter").GetString()))
        {
            string? adapter = cases.Key is null ? null
                : Path.Combine(ReferenceFile.Root, family, "adapters", cases.Key);
            // The official adapter, with whole modules, is too large to be committed.
            if (adapter is not null
                && !File.Exists(Path.Combine(adapter, "adapter_model.safetensors"))) continue;
            using AskedModel model = GenerationCase.Open(Model(family), adapter);
            var generator = new Generator(model.Model);
            foreach (JsonElement line in cases)
            {
                string name = line.GetProperty("case").GetString()!;
                string how = line.GetProperty("how").GetString()!;
                // Of the batch, prompts.json has the parts elsewhere.
                if (!prompts.TryGetProperty(name, out var prompt)) continue;
                seen++;
                GenerationInput input = GenerationCase.Unmasked(
                    GenerationCase.Input(model, prompt.GetProperty("case")));
                bool beams = how.StartsWith("beam", StringComparison.Ordinal);
                GeneratedTokens answer = generator.Run([input], new GenerationSettings
                {
                    MaxNewTokens = 16,
                    StopIds = model.Rows.Prompts.StopIds,
                    NumBeams = beams ? 3 : 1,
                    RepetitionPenalty = beams || how.Contains("1.2") ? 1.2 : 1,
                })[0];
                Assert.That(answer.Ids, Is.EqualTo(
                    ReferenceText.Ints(line.GetProperty("ids")[0])), $"{name}, {how}, {cases.Key}");
                string key = $"{cases.Key ?? "base"}.{name}.first_logits";
                if (beams || !all.GetProperty("first_logits").TryGetProperty(key, out var logits))
                    continue;
                AssertLogits(GenerationCase.Logits(model, input), logits);
            }
        }

        Assert.That(seen, Is.GreaterThanOrEqualTo(least));
    }

    [TestCase("l3", 4)]
    [TestCase("v2", 4)]
    public void AnswersOfTheOldScheme(string family, int least)
    {
        using AskedModel model = GenerationCase.Open(Model(family));
        var generator = new Generator(model.Model);
        var maker = new PromptMaker(model.Model.Spec, model.Rows);
        int seen = 0;
        foreach (JsonElement line in ReferenceText.Json($"generate/{family}.json").EnumerateArray())
        {
            GenerationInput input = GenerationCase.Input(maker, line, picture =>
                Path.Combine(ReferenceFile.Root, family, picture.GetString()!));
            Assert.That(input.Ids, Is.EqualTo(ReferenceText.Ints(line.GetProperty("input_ids"))));
            var settings = new GenerationSettings
            {
                MaxNewTokens = 16,
                StopIds = model.Rows.Prompts.StopIds,
            };
            Assert.That(generator.Run([input], settings)[0].Ids,
                Is.EqualTo(ReferenceText.Ints(line.GetProperty("greedy_ids"))));
            Assert.That(generator.Run([input], settings with
            {
                NumBeams = 3,
                RepetitionPenalty = 1.2,
            })[0].Ids, Is.EqualTo(ReferenceText.Ints(line.GetProperty("beam3_ids"))));
            AssertLogits(GenerationCase.Logits(model, input), line.GetProperty("first_logits"));
            seen++;
        }

        Assert.That(seen, Is.EqualTo(least));
    }

    [Test]
    public void AnswersOfO45()
    {
        using AskedModel model = GenerationCase.Open(Model("o45"));
        var generator = new Generator(model.Model);
        var maker = new PromptMaker(model.Model.Spec, model.Rows);
        foreach (JsonElement line in ReferenceText.Json("generate/o45.json").EnumerateArray())
        {
            GenerationInput input = GenerationCase.Input(maker, line, picture =>
                Path.Combine(ReferenceFile.Root, "generate", $"o45-{picture.GetInt32()}.png"));
            Assert.That(input.Ids, Is.EqualTo(ReferenceText.Ints(line.GetProperty("input_ids"))));
            JsonElement options = line.GetProperty("options");
            bool beams = !options.TryGetProperty("num_beams", out _);
            GeneratedTokens answer = generator.Run([input], new GenerationSettings
            {
                MaxNewTokens = 16,
                MinNewTokens = 16,
                StopIds = model.Rows.Prompts.StopIds,
                NumBeams = beams ? 3 : 1,
                RepetitionPenalty = beams ? 1.2
                    : options.TryGetProperty("repetition_penalty", out var penalty)
                    ? penalty.GetDouble() : model.Model.Spec.Family.Chat.RepetitionPenalty,
            })[0];
            Assert.That(answer.Ids,
                Is.EqualTo(ReferenceText.Ints(line.GetProperty("new_tokens"))), $"{options}");
            if (line.TryGetProperty("sequence_score", out var score))
                Assert.That(answer.Score, Is.EqualTo(score.GetDouble()).Within(1e-5));
            if (line.TryGetProperty("first_logits", out var logits))
                AssertLogits(GenerationCase.Logits(model, input), logits);
        }
    }

    [Test]
    public void BatchesEqualSingleRunsAndTheReference()
    {
        using AskedModel model = GenerationCase.Open(Model("v26"));
        var generator = new Generator(model.Model);
        JsonElement prompts = ReferenceText.Json("generation/prompts.json");
        int seen = 0;
        foreach (JsonElement line in ReferenceText.Json("generation/batches.json").EnumerateArray())
        {
            GenerationInput[] inputs = [.. line.GetProperty("prompts").EnumerateArray().Select(
                name => GenerationCase.Unmasked(GenerationCase.Input(
                    model, prompts.GetProperty(name.GetString()!).GetProperty("case"))))];
            GenerationSettings settings = GenerationCase.Settings(line.GetProperty("options"),
                ReferenceText.Ints(line.GetProperty("stop_ids")), 20);
            GeneratedTokens[] answers = generator.Run(inputs, settings);
            foreach (var (i, row) in line.GetProperty("rows").EnumerateArray().Index())
            {
                int[] expected = ReferenceText.Ints(row.GetProperty("ids"));
                Assert.That(answers[i].Ids, Is.EqualTo(expected));
                Assert.That(answers[i].Stopped,
                    Is.EqualTo(settings.StopIds.Contains(expected[^1])));
                Assert.That(generator.Run([inputs[i]], settings)[0].Ids, Is.EqualTo(expected));
                seen++;
            }
        }

        Assert.That(seen, Is.EqualTo(38));
    }

    [Test]
    public void BeamsAreThoseOfTransformers()
    {
        using AskedModel model = GenerationCase.Open(Model("v26"));
        var generator = new Generator(model.Model);
        JsonElement prompts = ReferenceText.Json("generation/prompts.json");
        foreach (JsonElement line in ReferenceText.Json("generation/beams.json").EnumerateArray())
        {
            JsonElement parameters = line.GetProperty("parameters");
            GenerationInput[] inputs = [.. line.GetProperty("prompts").EnumerateArray().Select(
                name => GenerationCase.Unmasked(GenerationCase.Input(
                    model, prompts.GetProperty(name.GetString()!).GetProperty("case"))))];
            int[] stops = ReferenceText.Ints(parameters.GetProperty("eos_token_id"));
            GeneratedTokens[] answers = generator.Run(inputs, GenerationCase.Settings(
                parameters, stops, parameters.GetProperty("max_new_tokens").GetInt32()));
            int each = parameters.TryGetProperty("num_return_sequences", out var several)
                ? several.GetInt32() : 1;
            for (int i = 0; i < inputs.Length; i++)
            {
                string what = $"{line.GetProperty("name")}, {i}";
                // transformers fills up to the longest answer with the stop token.
                int[] ids = ReferenceText.Ints(line.GetProperty("sequences")[i * each]);
                int stop = Array.FindIndex(ids, stops.Contains);
                Assert.That(answers[i].Ids,
                    Is.EqualTo(stop < 0 ? ids : ids[..(stop + 1)]), what);
                Assert.That(answers[i].Score, Is.EqualTo(
                    line.GetProperty("scores")[i * each].GetDouble()).Within(2e-5), what);
            }
        }
    }

    // Keys and values, or states and the convolution's last inputs, go on from piece to piece; a
    // picture stands where the first one would end.
    [TestCase("v26")]
    [TestCase("l3")]
    [TestCase("v46")]
    [TestCase("v47")]
    public void LongPromptsInPiecesAreAnsweredAsAtOnce(string family)
    {
        string folder = family switch
        {
            "v46" => V46.Model,
            "v47" => NativeCase.Of(family).Model,
            _ => Model(family),
        };
        using AskedModel model = GenerationCase.Open(folder);
        var maker = new PromptMaker(model.Model.Spec, model.Rows, 1);
        PromptPicture shown = maker.Open(
            Path.Combine(ReferenceFile.Root, "v26", "data", "images", "p0.png"));
        int start = Make(10).Pictures[0].Start, each = Make(11).Pictures[0].Start - start;
        GenerationInput input = Make(10 + ((Generator.Piece - 1 - start) / each));
        Assert.That(Generator.Piece, Is.InRange(
            input.Pictures[0].Start + 1, input.Pictures[0].End - 1));
        Assert.That(Generator.End(input, 0), Is.EqualTo(input.Pictures[0].Start));
        Assert.That(Generator.End(input, input.Pictures[0].Start),
            Is.GreaterThan(input.Pictures[0].End).And.LessThanOrEqualTo(input.Tokens));
        var generator = new Generator(model.Model);
        foreach (int beams in (int[])[1, 2])
        {
            var settings = new GenerationSettings { MaxNewTokens = 6, NumBeams = beams };
            model.Model.Model.MostTokens = Generator.Piece;
            int[] pieces = generator.Run([input], settings)[0].Ids;
            // Brought at once, it runs in pieces that end inside of pictures.
            int[] cut = generator.Run([input with { AppendPart = null }], settings)[0].Ids;
            model.Model.Model.MostTokens = int.MaxValue;
            int[] whole = generator.Run([input with { AppendPart = null }], settings)[0].Ids;
            Assert.That(pieces, Is.EqualTo(whole));
            Assert.That(cut, Is.EqualTo(whole));
        }

        GenerationInput Make(int words) => maker.Make(
            [
                new("user", [string.Concat(Enumerable.Repeat("one two ", words)), 0,
                    string.Concat(Enumerable.Repeat("three ", 150)), 1, "What?"]),
            ],
            [shown, shown]);
    }

    // What is drawn depends on seed and number alone: not on the batch, nor on what was before.
    [Test]
    public void DrawsAreOfTheSeedAndTheAnswersNumber()
    {
        using AskedModel model = GenerationCase.Open(Model("v26"));
        var generator = new Generator(model.Model);
        int[] ids = [501, 312, 198, 488, 83, 502, 198, 501, 352, 198];
        var settings = new GenerationSettings
        {
            DoSample = true,
            MaxNewTokens = 12,
            TopK = 100,
            TopP = 0.95,
            RepetitionPenalty = 1.05,
        };
        GenerationInput Input(int number) =>
            new(ids.Length, batch => batch.AddRow(ids, []), (ulong)number);
        int[][] together = Answers([.. Enumerable.Range(0, 8).Select(Input)], settings);
        Assert.That(together.Select(a => string.Join(' ', a)).Distinct().Count(),
            Is.EqualTo(8), "all different");
        for (int i = 0; i < 8; i++)
            Assert.That(Answers([Input(i)], settings)[0], Is.EqualTo(together[i]));
        Assert.That(Answers([Input(0)], settings with { Seed = 43 })[0],
            Is.Not.EqualTo(together[0]));

        int[][] Answers(GenerationInput[] inputs, GenerationSettings with) =>
            [.. generator.Run(inputs, with).Select(answer => answer.Ids)];
    }

    [Test]
    public void TokensAreToldAsTheyComeAndAStopEndsAtOnce()
    {
        using AskedModel model = GenerationCase.Open(Model("v26"));
        var generator = new Generator(model.Model);
        int[] ids = [501, 312, 198, 488, 83, 502, 198, 501, 352, 198];
        var input = new GenerationInput(ids.Length, batch => batch.AddRow(ids, []));
        var settings = new GenerationSettings { MaxNewTokens = 10 };
        int[] whole = generator.Run([input], settings)[0].Ids;
        var told = new List<int>();
        GeneratedTokens cut = generator.Run(
            [input], settings, Tell, () => told.Count < 4)[0];
        Assert.That(told, Is.EqualTo(whole[..4]));
        Assert.That(cut.Ids, Is.EqualTo(told));
        told.Clear();
        cut = generator.Run([input], settings, (_, id) => Tell(0, id) && told.Count < 4)[0];
        Assert.That(cut.Ids, Is.EqualTo(whole[..4]));
        told.Clear();
        GeneratedTokens stopped = generator.Run([input], settings with
        {
            StopIds = [whole[2]],
        }, Tell)[0];
        int at = Array.IndexOf(whole, whole[2]);
        Assert.That((stopped.Ids, stopped.Stopped), Is.EqualTo((whole[..(at + 1)], true)));
        Assert.That(told, Is.EqualTo(whole[..at]), "a stop token is not said");

        bool Tell(int _, int id)
        {
            told.Add(id);
            return true;
        }
    }

    // An adapter that is turned off leaves the model as it is without; one of them has biases of
    // the model that it has trained too.
    [TestCase("trained_lora_only")]
    [TestCase("variant_bias_all")]
    public void AnAdapterIsTurnedOffAndOn(string name)
    {
        string adapter = Path.Combine(ReferenceFile.Root, "v26", "adapters", name);
        JsonElement prompt = ReferenceText.Json("generation/prompts.json").GetProperty("single")
            .GetProperty("case");
        float[] plain;
        using (AskedModel without = GenerationCase.Open(Model("v26")))
            plain = GenerationCase.Logits(without, GenerationCase.Input(without, prompt));
        using AskedModel model = GenerationCase.Open(Model("v26"), adapter);
        GenerationInput input = GenerationCase.Input(model, prompt);
        float[] tuned = GenerationCase.Logits(model, input);
        model.IsAdapted = false;
        double[] expected = Array.ConvertAll(plain, v => (double)v);
        Assert.That(V26.LargestError(GenerationCase.Logits(model, input), expected),
            Is.LessThan(1e-6));
        Assert.That(V26.LargestError(tuned, expected), Is.GreaterThan(0.01));
        model.IsAdapted = true;
        Assert.That(GenerationCase.Logits(model, input), Is.EqualTo(tuned));
    }

    [TestCase("temperature", 0.0)]
    [TestCase("top_p", 1.5)]
    [TestCase("top_k", -1.0)]
    [TestCase("repetition_penalty", 0.0)]
    [TestCase("num_beams", 0.0)]
    [TestCase("max_new_tokens", 0.0)]
    [TestCase("min_new_tokens", 30.0)]
    public void SettingsThatMakeNoSenseAreNamed(string name, double value)
    {
        var settings = new GenerationSettings { MaxNewTokens = 20 };
        settings = name switch
        {
            "temperature" => settings with { Temperature = value },
            "top_p" => settings with { TopP = value },
            "top_k" => settings with { TopK = (int)value },
            "repetition_penalty" => settings with { RepetitionPenalty = value },
            "num_beams" => settings with { NumBeams = (int)value },
            "max_new_tokens" => settings with { MaxNewTokens = (int)value },
            _ => settings with { MinNewTokens = (int)value },
        };
        Assert.That(settings.Checked, Throws.TypeOf<InputException>()
            .With.Message.StartWith(FormattableString.Invariant($"{name} is {value}, expected")));
    }

    // The same ids as the CPU's, and so the reference's: a picture, a text beside it, a stop.
    [Test]
    public void OnCudaAnswersAreTheSame()
    {
        JsonElement prompts = ReferenceText.Json("generation/prompts.json");
        using var cuda = new CudaSource();
        using AskedModel model = AskedModel.Open(
            new TrainArguments { ModelNameOrPath = Model("v26"), Device = DeviceChoice.Cuda },
            null, cuda.Source);
        GenerationInput[] inputs = [.. ((string[])["single", "text_0"]).Select(name =>
            GenerationCase.Input(model, prompts.GetProperty(name).GetProperty("case")))];
        GeneratedTokens[] answers = new Generator(model.Model).Run(
            inputs, new GenerationSettings { MaxNewTokens = 4, StopIds = [154] });
        Assert.That(answers[0].Ids, Is.EqualTo((int[])[413, 367, 367, 367]));
        Assert.That(answers[1].Ids, Is.EqualTo((int[])[57, 154]));
    }

    // Rows of the cache move on the device.
    [Test]
    public void OnCudaBeamsAreTheSame()
    {
        using var cuda = new CudaSource();
        using AskedModel model = AskedModel.Open(
            new TrainArguments { ModelNameOrPath = Model("v26"), Device = DeviceChoice.Cuda },
            null, cuda.Source);
        using AskedModel cpu = GenerationCase.Open(Model("v26"));
        int[] ids = [501, 312, 198, 488, 83, 502, 198, 501, 352, 198];
        var input = new GenerationInput(ids.Length, batch => batch.AddRow(ids, []));
        var settings = new GenerationSettings
        {
            MaxNewTokens = 5,
            NumBeams = 3,
            RepetitionPenalty = 1.2,
        };
        GeneratedTokens expected = new Generator(cpu.Model).Run([input], settings)[0];
        GeneratedTokens got = new Generator(model.Model).Run([input], settings)[0];
        Assert.That(got.Ids, Is.EqualTo(expected.Ids));
        Assert.That(got.Score, Is.EqualTo(expected.Score).Within(1e-4));
    }

    private static void AssertLogits(float[] got, JsonElement expected) => Assert.That(
        V26.LargestError(got, [.. expected.EnumerateArray().Select(v => v.GetDouble())]),
        Is.LessThan(1e-5));
}
