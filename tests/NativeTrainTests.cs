using System.Text.Json;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Whole runs of V-4_6's successors and their answers: of MiniCPM-OCR's reference model, and of
/// V-4_6's as one of V-4_7.
/// </summary>
[TestFixture("v47")]
[TestFixture("ocr")]
public sealed class NativeTrainTests(string name)
{
    private string _folder = "", _model = "";

    private TrainArguments Full => V46.Full with
    {
        ModelNameOrPath = _model,
        DataPath = Path.Combine(_folder, "rows.json"),
        OutputDir = Path.Combine(_folder, "out"),
        LearningRate = 1e-3,
        LoggingSteps = new Interval(1),
    };

    [SetUp]
    public void Prepare()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        string model = Path.Combine(_folder, "model");
        Directory.CreateDirectory(model);
        _model = name == "ocr"
            ? NativeCase.Of(name).Model : CanvasPlacesTests.ModelAsV47(model);
        using Picture picture = name == "ocr"
            ? NativeCase.Of(name).Picture(1) : V46.Picture(1);
        V46.SaveBmp(picture, Path.Combine(_folder, "b.bmp"));
        File.WriteAllText(Path.Combine(_folder, "rows.json"), """
            [{"id": "one", "image": "b.bmp", "conversations": [
              {"role": "user", "content": "<image>\nText Recognition:"},
              {"role": "assistant", "content": "open from 9:00"}]},
             {"id": "text", "conversations": [
              {"role": "user", "content": "How many shapes are there?"},
              {"role": "assistant", "content": "Three."}]}]
            """);
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TheSavedModelHasTheFamilysOwnLayout()
    {
        TrainArguments arguments = Full with { MaxSteps = 3, MaxSliceNums = 3 };
        Runs.Train(arguments);
        using (Checkpoint before = Checkpoint.Open(_model),
            after = Checkpoint.Open(arguments.OutputDir))
        {
            Assert.That(after.Tensors.Select(t => $"{t.Name} {t.Shape}"),
                Is.EquivalentTo(before.Tensors.Select(t => $"{t.Name} {t.Shape}")));
            const string Merger = "model.vision_tower.vit_merger.pre_norm.bias";
            Assert.That(after.Get(Merger).ToFloats().SequenceEqual(before.Get(Merger).ToFloats()),
                Is.EqualTo(name == "ocr"), "is what it was where no gradient reaches it");
        }

        ModelSpec spec = ModelSpec.Read(_model), saved = ModelSpec.Read(arguments.OutputDir);
        Assert.That(saved.Family, Is.EqualTo(spec.Family));
        Assert.That(saved.Slicing, Is.EqualTo(spec.Slicing with { MaxSliceNums = 3 }));
        Assert.That(saved.Decoder.TiedHead, Is.EqualTo(spec.Decoder.TiedHead));
        AssertLossFell(arguments with { ModelNameOrPath = arguments.OutputDir }, arguments);
    }

    [Test]
    public void AdaptersSitOnTheDecodersMixersAndGoOn()
    {
        TrainArguments arguments = V46.Lora with
        {
            ModelNameOrPath = _model,
            DataPath = Full.DataPath,
            OutputDir = Full.OutputDir,
            LearningRate = 1e-2,
            LoggingSteps = new Interval(1),
            MaxSteps = 4,
            SaveSteps = new Interval(2),
            LoraDropout = 0.2,
            LoraTargetModules = new TrainArguments().LoraTargetModules,
        };
        Runs.Train(arguments);
        TrainArguments resumed = arguments with
        {
            OutputDir = Path.Combine(_folder, "resumed"),
            ResumeFromCheckpoint = new ResumePoint(RunFolder.Checkpoint(arguments.OutputDir, 2)),
        };
        Runs.Train(resumed);
        string file = Path.Combine(
            RunFolder.Checkpoint(arguments.OutputDir, 4), AdapterFile.WeightsName);
        Assert.That(File.ReadAllBytes(file).AsSpan().SequenceEqual(File.ReadAllBytes(Path.Combine(
            RunFolder.Checkpoint(resumed.OutputDir, 4), AdapterFile.WeightsName))), Is.True);
        AssertLossFell(arguments with { LoraWeightPath = arguments.OutputDir }, arguments);
        if (name != "ocr") return;
        // PEFT's names, and its class.
        NativeCase reference = NativeCase.Of(name);
        using var written = SafetensorsFile.Open(file);
        using var peft = SafetensorsFile.Open(
            Path.Combine(reference.Adapter("lora_init"), AdapterFile.WeightsName));
        Assert.That(written.Tensors.Select(t => t.Name),
            Is.EquivalentTo(peft.Tensors.Select(t => t.Name)));
        JsonElement ours = JsonDocument.Parse(File.ReadAllBytes(Path.Combine(
            arguments.OutputDir, "adapter_config.json"))).RootElement;
        Assert.That(
            ours.GetProperty("auto_mapping").GetRawText().Replace(" ", "").Replace("\n", ""),
            Is.EqualTo(reference.Json("lora_init/adapter_config.json").GetProperty("auto_mapping")
                .GetRawText().Replace(" ", "").Replace("\n", "")));
    }

    [Test]
    public void AFullRunGoesOnBitForBit()
    {
        TrainArguments arguments = Full with
        {
            Bf16 = true,
            MaxSteps = 2,
            SaveSteps = new Interval(1),
        };
        Runs.Train(arguments);
        TrainArguments resumed = arguments with
        {
            OutputDir = Path.Combine(_folder, "resumed"),
            ResumeFromCheckpoint = new ResumePoint(RunFolder.Checkpoint(arguments.OutputDir, 1)),
        };
        Runs.Train(resumed);
        string[] files = Directory.GetFiles(
            RunFolder.Checkpoint(arguments.OutputDir, 2), "*.safetensors");
        Assert.That(files, Is.Not.Empty);
        foreach (string file in files)
            Assert.That(File.ReadAllBytes(file).AsSpan().SequenceEqual(File.ReadAllBytes(
                Path.Combine(RunFolder.Checkpoint(resumed.OutputDir, 2), Path.GetFileName(file)))),
                Is.True, file);
    }

    [Test]
    public void TheCommandsTakeTheModel()
    {
        string trace = Path.Combine(_folder, "trace.safetensors");
        string[] model = ["--model_name_or_path", _model, "--data_path", Full.DataPath!];
        Assert.That(Run(["data", "check", .. model]), Does.Contain(": 2 rows, 0 bad"));
        Run(["trace", "--rows", "one", "--out", trace, "--gradients", .. model]);
        using var file = SafetensorsFile.Open(trace);
        Assert.That(file.Tensors.Select(t => t.Name), Is.SupersetOf(ModelSpec.Read(_model)
            .Parameters.All.Where(p => !p.Fixed).Select(p => "grad." + p.Name)));
        Assert.That(Run(["plan", .. model, "--gpu", "24GB", "--bf16"]),
            Does.Contain("fits into a card of 24GB"));
    }

    // Each token is the likeliest of the whole text before it, which no cache holds.
    [Test]
    public void AnswersOverTheCacheAreThoseOfTheWholeText()
    {
        using var model = TunedModel.Open(Full);
        RowFormat format = model.Loaded.Rows;
        var maker = new PromptMaker(model.Spec, format);
        PromptPicture picture = maker.Open(Path.Combine(_folder, "b.bmp"));
        var turns = new List<PromptTurn> { new("user", [0, "Text Recognition:"]) };
        int[] first = Ask();
        turns.Add(new PromptTurn("assistant", ["Nothing."]));
        turns.Add(new PromptTurn("user", [1, "And this?"]));
        Assert.That(Ask(), Has.Length.EqualTo(first.Length));

        int[] Ask()
        {
            GenerationInput input = maker.Make(turns, [picture, picture]);
            int[] ids = new Generator(model.Loaded).Run([input], new GenerationSettings
            {
                MaxNewTokens = 6,
                MinNewTokens = 6,
                StopIds = format.Prompts.StopIds,
            })[0].Ids;
            var batch = new Batch();
            batch.Clear();
            int[] all = [.. input.Ids, .. ids];
            int pictures = turns.Count(t => t.Role == "user");
            batch.AddRow(all, format.Placeholders.Bounds(all)!, places: format.Places(
                all, Enumerable.Repeat(picture.Plan, pictures)));
            for (int i = 0; i < pictures; i++)
            {
                using Picture one = picture.Decode();
                batch.TryAddPicture(format.NewStrips(), one, picture.Plan,
                    format.Placeholders.Features(picture.Plan));
            }

            batch.LabelRows.Add(0);
            batch.Targets.Add(0);
            float[] logits = Trace.Run(model, batch, gradients: false).Floats["logits"].Values;
            int vocabulary = model.Spec.Decoder.VocabSize;
            for (int i = 0; i < ids.Length; i++)
            {
                Span<float> row = logits.AsSpan(
                    (input.Tokens + i - 1) * vocabulary, vocabulary);
                foreach (int stop in format.Prompts.StopIds) row[stop] = float.NegativeInfinity;
                int best = 0;
                for (int v = 1; v < row.Length; v++) if (row[v] > row[best]) best = v;
                Assert.That(ids[i], Is.EqualTo(best), $"token {i}");
            }

            return ids;
        }
    }

    [Test]
    public void AnswersAreThoseOfGenerate()
    {
        if (name != "ocr") Assert.Ignore("see MiniCpmV47Tests");
        NativeCase reference = NativeCase.Of(name);
        using var model = TunedModel.Open(reference.Full);
        var generator = new Generator(model.Loaded);
        RowFormat format = model.Loaded.Rows;
        int compared = 0;
        foreach (JsonElement call in reference.Json("generate.json").EnumerateArray())
        {
            JsonElement tokens = call.GetProperty("new_tokens");
            int count = tokens[0].GetArrayLength(), picture = 0;
            int[] pictures = ReferenceText.Ints(call.GetProperty("pictures"));
            var inputs = new List<GenerationInput>();
            for (int row = 0; row < tokens.GetArrayLength(); row++)
            {
                int shown = call.GetProperty("prompts")[row].GetString()!
                    .Split("<|image_pad|>").Length - 1;
                inputs.Add(reference.Prompt(
                    format, call, row, pictures[picture..(picture + shown)]));
                picture += shown;
            }

            GeneratedTokens[] answers = generator.Run(inputs, new GenerationSettings
            {
                MaxNewTokens = count,
                MinNewTokens = count,
                StopIds = [.. model.Spec.Generation.EosTokenIds],
            });
            foreach (var (i, answer) in answers.Index())
            {
                Assert.That(answer.Ids, Is.EqualTo(ReferenceText.Ints(tokens[i])));
                compared++;
            }
        }

        Assert.That(compared, Is.EqualTo(6));
    }

    private static void AssertLossFell(TrainArguments after, TrainArguments before)
    {
        Assert.That(Loss(after), Is.LessThan(Loss(before) - 0.01));

        static double Loss(TrainArguments arguments)
        {
            using var model = TunedModel.Open(arguments);
            var batch = new Batch();
            batch.Clear();
            DataRows.Read(arguments.DataPath!, arguments, model.Loaded.Rows).Append(0, batch);
            return Trace.Run(model, batch, gradients: false).Floats["loss"].Values[0];
        }
    }

    private static string Run(string[] arguments)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        int code = new CommandLine(output, error, new Runners()).Run(arguments);
        Assert.That(code, Is.Zero, error.ToString());
        return output.ToString();
    }
}
