using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Configurations of other tools and in YAML, and models named as on the hub.</summary>
[TestFixture]
public sealed class OtherToolsTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    private string Refused(params string[] arguments) => Assert.Throws<InputException>(
        () => TrainReader.Read(arguments, _folder))!.Message;

    [Test]
    public void EveryKeyOfTheirRecipesIsKnownOrAnswered()
    {
        // Names of LLaMA-Factory 0.9.5 and ms-swift 4.6.0, as their recipes use them.
        foreach (string key in ReferenceText.Lines("formats/keys.json")[0].EnumerateArray()
            .Select(key => key.GetString()!))
        {
            string message = Refused("--" + key, "never-a-value", "--no_such_thing", "1");
            Assert.That(message, Does.Not.Contain($"unknown key \"{key}\""));
        }
    }

    [Test]
    public void WhatIsSetInsteadIsAKeyOfThisProgram()
    {
        var known = TrainKeys.Train.Select(key => key.Name).ToHashSet();
        foreach (string key in ReferenceText.Lines("formats/keys.json")[0].EnumerateArray()
            .Select(key => key.GetString()!))
        {
            if (OtherToolsKeys.Advice(key) is not { } advice) continue;
            Assert.That(known, Does.Not.Contain(key));
            if (!advice.Contains(": set ")) continue;
            string name = advice[(advice.IndexOf(": set ") + 6)..].Split(' ', ',', '=')[0];
            Assert.That(known, Does.Contain(name), key);
        }
    }

    [TestCase("lora_rr", "did you mean \"lora_r\"?")]
    [TestCase("learning_rte", "did you mean \"learning_rate\"?")]
    [TestCase("zebra_crossing", "unknown key \"zebra_crossing\"")]
    public void OnlyNearNamesAreGuessed(string key, string said)
    {
        string message = Refused("--" + key, "1");
        Assert.That(message, Does.Contain(said));
        Assert.That(message.Contains("did you mean"), Is.EqualTo(said.StartsWith("did")));
    }

    [Test]
    public void AllProblemsAreCounted()
    {
        string[] arguments =
            [.. Enumerable.Range(0, 40).SelectMany(i => new[] { $"--zebra_{i}", "1" })];
        Assert.That(Refused(arguments), Does.EndWith("; and 10 more"));
    }

    [Test]
    public void YamlIsReadAsJson()
    {
        File.WriteAllText(Path.Combine(_folder, "train.yaml"), """
            ### model
            model_name_or_path: model   # beside this file
            data_path: [a.json, "b.json"]
            use_lora: true
            tune_llm: False
            learning_rate: 1.0e-4
            weight_decay: 1e-2
            max_steps: 7
            run_name: "1e5"
            lora_target_modules:
              - q_proj
              - v_proj
            lr_scheduler_type: polynomial
            lr_scheduler_kwargs: {lr_end: 1e-6}
            save_total_limit: null
            """);
        Directory.CreateDirectory(Path.Combine(_folder, "model"));
        var a = TrainReader.Read(["train.yaml"], _folder);
        Assert.That(
            (a.LearningRate, a.WeightDecay, a.MaxSteps, a.RunName, a.TuneLlm, a.SaveTotalLimit),
            Is.EqualTo((1e-4, 1e-2, 7, "1e5", false, (int?)null)));
        Assert.That(a.LoraTargetModules.Suffixes, Is.EqualTo((string[])["q_proj", "v_proj"]));
        Assert.That(a.LrSchedulerKwargs.LrEnd, Is.EqualTo(1e-6));
        Assert.That(a.DataPath!.Paths, Is.EqualTo((string[])
            [Path.Combine(_folder, "a.json"), Path.Combine(_folder, "b.json")]));
        // What is written of it is read again as the same.
        File.WriteAllBytes(Path.Combine(_folder, "again.json"), TrainWriter.ToJson(a));
        Assert.That(TrainReader.Read(["again.json"], _folder).DataPath, Is.EqualTo(a.DataPath));
    }

    [TestCase("a: b: c", "is not valid YAML at line 1")]
    [TestCase("seed: 1\nseed: 2", "a key is there twice")]
    [TestCase("- a", "key: value")]
    [TestCase("", "key: value")]
    [TestCase("a: &x [*x]", "nested too deeply")]
    [TestCase("a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c "
        + "[*b,*b,*b,*b,*b,*b,*b,*b]\n"
        + "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f "
        + "[*e,*e,*e,*e,*e,*e,*e,*e]\n"
        + "g: &g [*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g]", "aliases")]
    public void BrokenYamlIsOneLine(string text, string said)
    {
        File.WriteAllText(Path.Combine(_folder, "c.yml"), text);
        Assert.That(Refused("c.yml"), Does.Contain(said).And.Not.Contain("\n"));
    }

    // Of ms-swift 2 and of LLaMA-Factory's optimizers, which the lists of recipes lack.
    [TestCase("custom_train_dataset_path", "a.jsonl", "set data_path")]
    [TestCase("lora_dropout_p", "0.05", "set lora_dropout")]
    [TestCase("use_galore", "true", "LoRA")]
    [TestCase("report_to", "wandb", "train_log.jsonl")]
    [TestCase("report_to", "[\"tensorboard\", \"swanlab\"]", "report_to is \"swanlab\"")]
    [TestCase("report_to", "[\"tensorboard\", \"none\"]", "expected none alone")]
    [TestCase("lora_target_modules", "llm.*[", "unterminated bracket at character 6")]
    [TestCase("lr_scheduler_type", "cosine_with_min_lr", "one of min_lr and min_lr_rate")]
    [TestCase("load_best_model_at_end", "true", "eval_strategy and save_strategy to be the same")]
    [TestCase("neftune_noise_alpha", "-1", "expected a number at least 0 and at most 1000000")]
    [TestCase("metric_for_best_model", "eval_f1", "expected one of eval_loss, eval_token_accuracy")]
    public void WhatIsNotSupportedIsAnsweredInWords(string key, string value, string said) =>
        Assert.That(Refused("--" + key, value), Does.Contain(said));

    [Test]
    public void AHubNameIsFoundInTheCacheOrSaidToBeOne()
    {
        string? before = Environment.GetEnvironmentVariable("HF_HOME");
        string? hub = Environment.GetEnvironmentVariable("HF_HUB_CACHE");
        try
        {
            Environment.SetEnvironmentVariable("HF_HUB_CACHE", null);
            Environment.SetEnvironmentVariable("HF_HOME", _folder);
            string[] arguments = ["--model_name_or_path", "owner/model", "--data_path", "a.json",
                "--use_lora", "--tune_llm", "false"];
            Assert.That(Refused(arguments), Does.Contain("hf download owner/model"));
            string model = Path.Combine(_folder, "hub", "models--owner--model");
            foreach (string snapshot in (string[])["aaa", "bbb"])
            {
                Directory.CreateDirectory(Path.Combine(model, "snapshots", snapshot));
                File.WriteAllText(Path.Combine(model, "snapshots", snapshot, "config.json"), "{}");
            }

            Directory.CreateDirectory(Path.Combine(model, "refs"));
            File.WriteAllText(Path.Combine(model, "refs", "main"), "aaa\n");
            var notices = new List<string>();
            Assert.That(TrainReader.Read(arguments, _folder, notices.Add).ModelNameOrPath,
                Is.EqualTo(Path.Combine(model, "snapshots", "aaa")));
            Assert.That(notices.Single(), Does.Contain("found in the Hugging Face cache"));
        }
        finally
        {
            Environment.SetEnvironmentVariable("HF_HOME", before);
            Environment.SetEnvironmentVariable("HF_HUB_CACHE", hub);
        }
    }
}
