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

/// <summary>Whole runs of MiniCPM-V 4.6's reference model, and its answers.</summary>
[TestFixture]
public sealed class MiniCpmV46TrainTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TheSavedModelHasTheFamilysOwnLayout()
    {
        TrainArguments arguments = Steps(V46.Full, 3) with { MaxSliceNums = 3 };
        Runs.Train(arguments);
        using (Checkpoint before = Checkpoint.Open(V46.Model),
            after = Checkpoint.Open(arguments.OutputDir))
            Assert.That(after.Tensors.Select(t => $"{t.Name} {t.Shape}"),
                Is.EquivalentTo(before.Tensors.Select(t => $"{t.Name} {t.Shape}")));
        foreach (string path in Directory.GetFiles(V46.Model))
        {
            string file = Path.GetFileName(path);
            if (file is "config.json" or "processor_config.json" or Checkpoint.SingleFile)
                continue;
            Assert.That(File.ReadAllBytes(Path.Combine(arguments.OutputDir, file)),
                Is.EqualTo(File.ReadAllBytes(path)), file);
        }

        // Only the processor's file says how pictures are cut.
        Assert.That(File.ReadAllText(Path.Combine(arguments.OutputDir, "config.json")),
            Does.Not.Contain("max_slice_nums").And.Not.Contain("use_image_id"));
        Assert.That(ModelSpec.Read(arguments.OutputDir).Slicing,
            Is.EqualTo(ModelSpec.Read(V46.Model).Slicing with { MaxSliceNums = 3 }));
        AssertLossFell(arguments with { ModelNameOrPath = arguments.OutputDir }, arguments);
    }

    [Test]
    public void AdaptersSitWhereNothingIsSaidOnAllOfTheDecodersMixers()
    {
        TrainArguments arguments = Steps(V46.Lora, 3) with
        {
            LoraTargetModules = new TrainArguments().LoraTargetModules,
        };
        Runs.Train(arguments);
        using (var written = SafetensorsFile.Open(
            Path.Combine(arguments.OutputDir, AdapterFile.WeightsName)))
        using (var peft = SafetensorsFile.Open(
            Path.Combine(V46.Adapter("lora_init"), AdapterFile.WeightsName)))
            Assert.That(written.Tensors.Select(t => $"{t.Name} {t.Shape}"),
                Is.EquivalentTo(peft.Tensors.Select(t => $"{t.Name} {t.Shape}")));
        AssertLossFell(arguments with { LoraWeightPath = arguments.OutputDir }, arguments);
    }

    [TestCase(false)]
    [TestCase(true)]
    public void ARunGoesOnBitForBit(bool lora)
    {
        TrainArguments arguments = Steps(lora
            ? V46.Lora with { LoraDropout = 0.2 } : V46.Full with { Bf16 = true }, 4) with
        {
            SaveSteps = new Interval(2),
            Threads = 1,
        };
        Runs.Train(arguments);
        TrainArguments resumed = arguments with
        {
            OutputDir = Path.Combine(_folder, "resumed"),
            ResumeFromCheckpoint =
                new ResumePoint(RunFolder.Checkpoint(arguments.OutputDir, 2)),
            Threads = 2,
        };
        Runs.Train(resumed);
        string[] files = Directory.GetFiles(
            RunFolder.Checkpoint(arguments.OutputDir, 4), "*.safetensors");
        Assert.That(files, Has.Length.EqualTo(2));
        foreach (string file in files)
            Assert.That(File.ReadAllBytes(file).AsSpan().SequenceEqual(File.ReadAllBytes(
                Path.Combine(RunFolder.Checkpoint(resumed.OutputDir, 4), Path.GetFileName(file)))),
                Is.True, file);
    }

    [Test]
    public void TheCommandsTakeTheModel()
    {
        string trace = Path.Combine(_folder, "trace.safetensors");
        string[] model = ["--model_name_or_path", V46.Model, "--data_path", V46.Data(_folder)];
        Assert.That(Run(["data", "check", .. model]), Does.Contain(": 2 rows, 0 bad"));
        Run(["trace", "--rows", "one", "--out", trace, "--gradients", .. model]);
        using var file = SafetensorsFile.Open(trace);
        Assert.That(file.Tensors.Select(t => t.Name), Is.SupersetOf(
            ModelSpec.Read(V46.Model).Parameters.All.Select(p => "grad." + p.Name)));
        Assert.That(file.Tensors.Select(t => t.Name), Is.SupersetOf((string[])["merger",
            "vision.vit_merger", "llm.norm", "logits"]));
    }

    // Alone, and two together, of which the shorter one's states wait for the other's prompt.
    [Test]
    public void AnswersAreThoseOfGenerate()
    {
        using var model = TunedModel.Open(V46.Full);
        var generator = new Generator(model.Loaded);
        RowFormat format = model.Loaded.Rows;
        int compared = 0;
        foreach (JsonElement call in V46.Json("generate.json").EnumerateArray())
        {
            int[] pictures = ReferenceText.Ints(call.GetProperty("pictures"));
            JsonElement tokens = call.GetProperty("new_tokens");
            int count = tokens[0].GetArrayLength(), picture = 0;
            var inputs = new List<GenerationInput>();
            foreach (var (i, given) in call.GetProperty("input_ids").EnumerateArray().Index())
            {
                int padding = ReferenceText.Ints(call.GetProperty("attention_mask")[i])
                    .Count(m => m == 0);
                int[] ids = ReferenceText.Ints(given)[padding..];
                var shown = new List<int>();
                ImageBound[] bounds = format.Placeholders.Bounds(ids)!;
                for (int views = 0; views < bounds.Length; picture++)
                {
                    using Picture one = V46.Picture(pictures[picture]);
                    views += V46.Plan(format, one.Size).Views;
                    shown.Add(pictures[picture]);
                }

                inputs.Add(new GenerationInput(ids.Length, batch =>
                {
                    batch.AddRow(ids, bounds);
                    foreach (int index in shown)
                    {
                        using Picture one = V46.Picture(index);
                        SlicePlan plan = V46.Plan(format, one.Size);
                        batch.TryAddPicture(
                            format.NewStrips(), one, plan, format.Placeholders.Features(plan));
                    }
                })
                {
                    Ids = ids,
                });
            }

            GeneratedTokens[] answers = generator.Run(inputs, new GenerationSettings
            {
                MaxNewTokens = count,
                MinNewTokens = count,
                StopIds = [600, 602],
            });
            foreach (var (i, answer) in answers.Index())
            {
                Assert.That(answer.Ids, Is.EqualTo(ReferenceText.Ints(tokens[i])));
                compared++;
            }
        }

        Assert.That(compared, Is.EqualTo(4));
    }

    private TrainArguments Steps(TrainArguments arguments, int steps) => arguments with
    {
        DataPath = V46.Data(_folder),
        OutputDir = Path.Combine(_folder, "out"),
        MaxSteps = steps,
        LearningRate = 1e-3,
        LoggingSteps = new Interval(1),
    };

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
