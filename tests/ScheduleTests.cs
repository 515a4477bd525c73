using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

public sealed class ScheduleTests
{
    [TestCase(0, 0, 10, "learning_rate is 0, which is 0 in 32 bits: nothing is learned")]
    [TestCase(1e-320, 0, 10, "nothing is learned")]
    [TestCase(1e-4, 10, 10, "the warm-up has 10 steps, the run 10: learning_rate 0.0001 is never "
        + "reached, the largest is 9e-05")]
    [TestCase(1e-4, 9, 10, null)]
    [TestCase(1e-4, 0, 1, null)]
    public void ARunThatLearnsLittleIsTold(double peak, int warmup, int total, string? expected)
    {
        var schedule = new Schedule(LrSchedule.Linear, peak, warmup, total, new ScheduleOptions());
        Assert.That(schedule.Notice, expected is null ? Is.Null : Does.Contain(expected));
        Assert.That((schedule with { Type = LrSchedule.Constant }).Notice is null,
            Is.EqualTo((float)peak > 0));
    }

    [TestCase(1e-2, 100, 10, "learning_rate 0.01 times weight_decay 100 is 1: from 1 on each step")]
    [TestCase(1e-2, 99, 10, null)]
    [TestCase(1e-2, 0, 11, "save_steps 11 is above the run's 10 steps: nothing is saved before its "
        + "end")]
    public void SettingsThatNobodyMeansAreSaid(
        double rate, double decay, int saving, string? expected)
    {
        TrainArguments arguments = V26.Full with
        {
            LearningRate = rate,
            WeightDecay = decay,
            SaveSteps = new Interval(saving),
            MaxSteps = 10,
        };
        ModelSpec spec = ModelSpec.Read(arguments.ModelNameOrPath!);
        string[] said = [.. RunNotices.Of(
            arguments, Schedule.Of(arguments, 10), new StepPlan(arguments, 5), spec)];
        Assert.That(said, expected is null ? Is.Empty : Has.One.StartsWith(expected));
        ModelSpec shorter = spec with { Decoder = spec.Decoder with { MaxPositions = 100 } };
        Assert.That(RunNotices.Of(
            arguments, Schedule.Of(arguments, 10), new StepPlan(arguments, 5), shorter).Last(),
            Does.EndWith("is above the model's max_position_embeddings 100: longer rows are at "
                + "places that it never saw"));
    }

    [Test]
    public void AdaptersThatAreMultipliedByZeroAreRefused() => Assert.That(
        () => TrainReader.Read(["--model_name_or_path=m", "--data_path=d", "--use_lora",
            "--tune_llm=false", "--lora_alpha=1e-320"], "/"),
        Throws.TypeOf<InputException>().With.Message.Contains("lora_alpha is 1E-320"));

    // transformers: the wave shrunk to 1 - min_lr_rate, on top of it; the warm-up as it is.
    [TestCase(null, 0.1)]
    [TestCase(1e-4, null)]
    public void CosineEndsAtTheLowestRate(double? rate, double? share)
    {
        var schedule = new Schedule(LrSchedule.CosineWithMinLr, 1e-3, 2, 10,
            new ScheduleOptions { MinLr = rate, MinLrRate = share });
        Assert.That(new[] { 0, 1, 2, 4, 6, 10 }.Select(schedule.At), Is.EqualTo(new[]
        {
            0, 0.5e-3, 1e-3, 1e-3 * (0.1 + (0.9 * (2 + Math.Sqrt(2)) / 4)), 0.55e-3, 1e-4,
        }).Within(1e-12).Percent);
    }

    [TestCase("{}", "wants one of min_lr and min_lr_rate")]
    [TestCase("""{"min_lr": 1e-6, "min_lr_rate": 0.1}""", "wants one of min_lr and min_lr_rate")]
    [TestCase("""{"min_lr": 1}""", "min_lr 1 must not be above learning_rate")]
    public void ALowestRateIsSaidOnceAndBelowTheHighest(string options, string said) => Assert.That(
        () => TrainReader.Read(["--model_name_or_path=m", "--data_path=d",
            "--lr_scheduler_type=cosine_with_min_lr", "--lr_scheduler_kwargs", options], "/"),
        Throws.TypeOf<InputException>().With.Message.Contains(said));

    [Test]
    public void EqualsTransformersAndDeepSpeedAtEveryStep()
    {
        var file = ReferenceFile.Open("ops/schedules");
        Assert.That(file.Cases, Is.Not.Empty);
        foreach (var reference in file.Cases)
        {
            var p = reference.Params;
            bool deepSpeed = p.GetProperty("name").GetString() == "WarmupLR";
            var schedule = deepSpeed
                ? new Schedule(
                    LrSchedule.WarmupLr, p.GetProperty("warmup_max_lr").GetDouble(),
                    p.GetProperty("warmup_num_steps").GetInt32(), 0,
                    new ScheduleOptions
                    {
                        WarmupMinLr = p.GetProperty("warmup_min_lr").GetDouble(),
                        WarmupType = Enum.Parse<WarmupCurve>(
                            p.GetProperty("warmup_type").GetString()!, ignoreCase: true),
                    })
                : new Schedule(
                    Enum.Parse<LrSchedule>(
                        p.GetProperty("name").GetString()!.Replace("_", ""), ignoreCase: true),
                    p.GetProperty("base_lr").GetDouble(), p.GetProperty("warmup").GetInt32(),
                    p.GetProperty("total").GetInt32(), Options(p.GetProperty("kwargs")));
            double[] expected = reference.Doubles("lr");
            // Old DeepSpeed releases left the rate of the very first step unset; from then on
            // equal.
            bool old = deepSpeed && p.GetProperty("variant").GetString() == "old";
            for (int step = old ? 1 : 0; step < expected.Length; step++)
            {
                Assert.That(schedule.At(step), Is.EqualTo(expected[step]).Within(1e-15).Percent,
                    $"{reference.Name} {schedule} step {step}");
            }
        }
    }

    private static ScheduleOptions Options(System.Text.Json.JsonElement kwargs)
    {
        var options = new ScheduleOptions();
        foreach (var option in kwargs.EnumerateObject())
        {
            double value = option.Value.GetDouble();
            options = option.Name switch
            {
                "num_cycles" => options with { NumCycles = value },
                "power" => options with { Power = value },
                "lr_end" => options with { LrEnd = value },
                _ => throw new InvalidDataException(option.Name),
            };
        }

        return options;
    }
}
