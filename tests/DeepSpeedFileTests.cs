using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The key deepspeed: the official files and those that users take with other trainers, every key
/// taken over, accepted without an effect, or refused by name.
/// </summary>
[TestFixture]
public sealed class DeepSpeedFileTests
{
    // As the official script's ds_config_zero2.json and ds_config_zero3.json have them.
    private const string Common = """
        {"fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000,
          "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
         "bf16": {"enabled": "auto"},
         "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto",
          "weight_decay": "auto"}},
         "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto",
          "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
         "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
         "steps_per_print": 100, "train_batch_size": "auto",
         "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false
        """;

    private const string Zero2 = Common + """
        , "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none",
          "pin_memory": true}, "allgather_partitions": true, "allgather_bucket_size": 2e8,
          "overlap_comm": true, "reduce_scatter": true, "reduce_bucket_size": 2e8,
          "contiguous_gradients": true}}
        """;

    private const string Zero3 = Common + """
        , "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none",
          "pin_memory": true}, "offload_param": {"device": "none", "pin_memory": true},
          "overlap_comm": true, "contiguous_gradients": true, "sub_group_size": 1e9,
          "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
          "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
          "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": true}}
        """;

    // LLaMA-Factory's ds_z3_offload_config.json.
    private const string Offload = """
        {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
         "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
         "zero_allow_untested_optimizer": true,
         "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000,
          "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
         "bf16": {"enabled": "auto"},
         "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu",
          "pin_memory": true}, "offload_param": {"device": "cpu", "pin_memory": true},
          "overlap_comm": false, "contiguous_gradients": true, "sub_group_size": 1e9,
          "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
          "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
          "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": true}}
        """;

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void TheOfficialFilesAreDeepSpeedsSettings([Values(Zero2, Zero3)] string file)
    {
        TrainArguments a = Read(file, out List<string> said);
        Assert.That((a.LrSchedulerType, a.WeightDecayScope),
            Is.EqualTo((LrSchedule.WarmupLr, DecayScope.All)));
        Assert.That((a.OffloadOptimizer, a.OffloadParam), Is.EqualTo(((bool?)null, (bool?)null)));
        Assert.That(said, Is.Empty);
        // What is said to the run itself stays, and is spoken of.
        a = Read(file, out said, "--lr_scheduler_type", "cosine", "--weight_decay_scope", "hf");
        Assert.That((a.LrSchedulerType, a.WeightDecayScope),
            Is.EqualTo((LrSchedule.Cosine, DecayScope.Hf)));
        Assert.That(said, Has.Exactly(1).Contains("DeepSpeed would use its scheduler WarmupLR"));
        Assert.That(said, Has.Exactly(1).Contains("weight_decay_scope decides"));
        Assert.That(said, Has.Count.EqualTo(2));
    }

    [Test]
    public void OffloadingIsThatOfTheRun()
    {
        TrainArguments a = Read(Offload, out List<string> said);
        Assert.That((a.OffloadOptimizer, a.OffloadParam), Is.EqualTo(((bool?)true, (bool?)true)));
        Assert.That((a.LrSchedulerType, a.WeightDecayScope), Is.EqualTo((
            new TrainArguments().LrSchedulerType, new TrainArguments().WeightDecayScope)));
        Assert.That(said, Is.Empty);
        Assert.That(() => Read(Offload, out _, "--offload_param", "false"), Throws
            .TypeOf<InputException>().With.Message.EqualTo("ds.json: "
                + "zero_optimization.offload_param"
                + ".device is true, offload_param is false: leave one of them out"));
    }

    [TestCase("{'zero_optimization': {'cpu_offload': true}}", "offload_optimizer", true)]
    [TestCase("{'optimizer': {'type': 'Adam', 'params': {'lr': 3e-4, 'betas': [0.8, 0.9]}}}",
        "adam_beta1", 0.8)]
    [TestCase("{'optimizer': {'params': {'lr': 3e-4}}}", "learning_rate", 3e-4)]
    [TestCase("{'scheduler': {'type': 'WarmupLR', 'params': {'warmup_num_steps': 7}}}",
        "warmup_steps", 7.0)]
    [TestCase("{'gradient_accumulation_steps': 4}", "gradient_accumulation_steps", 4)]
    [TestCase("{'gradient_clipping': 0.5}", "max_grad_norm", 0.5)]
    [TestCase("{'train_micro_batch_size_per_gpu': 2}", "per_device_train_batch_size", 2)]
    [TestCase("{'bf16': {'enabled': true}, 'fp16': {'enabled': false}}", "bf16", true)]
    public void ValuesAreTakenOver(string file, string key, object value)
    {
        TrainArguments a = Read(file.Replace('\'', '"'), out List<string> said);
        Assert.That(TrainKeys.Train.First(k => k.Name == key).Property.GetValue(a),
            Is.EqualTo(value));
        Assert.That(said, Is.Empty);
    }

    [TestCase("{'zero_optimization': {'offload_param': {'device': 'nvme', 'nvme_path': '/x'}}}",
        "zero_optimization.offload_param.device = \"nvme\" is not supported")]
    [TestCase("{'zero_optimization': {'offload_optimiser': {'device': 'cpu'}}}",
        "zero_optimization.offload_optimiser.device = \"cpu\" is unknown (did you mean "
        + "\"zero_optimization.offload_optimizer.device\"?)")]
    [TestCase("{'optimizer': {'type': 'Lamb'}}", "set optim")]
    [TestCase("{'scheduler': {'type': 'OneCycle'}}", "set lr_scheduler_type")]
    [TestCase("{'zero_optimization': {'zero_quantized_weights': true}}", "q_lora")]
    [TestCase("{'flops_profiler': {'enabled': true, 'top_modules': 1}}", "cpmx plan")]
    [TestCase("{'amp': {'enabled': true}}", "bf16")]
    [TestCase("{'sparse_attention': {'mode': 'fixed'}}", "sparse_attention.mode = \"fixed\" is "
        + "unknown")]
    [TestCase("{'gradient_clipping': 'much'}", "gradient_clipping")]
    [TestCase("[]", "ds.json")]
    public void TheRestIsRefusedByName(string file, string message) =>
        Assert.That(() => Read(file.Replace('\'', '"'), out _),
            Throws.TypeOf<InputException>().With.Message.Contains(message));

    [Test]
    public void WhatIsOffDoesNotMatter() => Assert.That(() => Read("""
        {"flops_profiler": {"enabled": false, "top_modules": 1}, "wandb": {"enabled": false},
         "activation_checkpointing": {"partition_activations": true, "cpu_checkpointing": false}}
        """, out _), Throws.Nothing);

    [Test]
    public void AFileThatIsNotThereIsRefusedUnlessItIsTheOfficialOne()
    {
        Assert.That(() => Read(null, out _, "--deepspeed", "mine.json"),
            Throws.TypeOf<InputException>().With.Message.Contains("mine.json"));
        Read(null, out List<string> said, "--deepspeed", "ds_config_zero3.json");
        Assert.That(said.Single(), Does.StartWith("deepspeed is not used"));
        Read(null, out said, "--deepspeed", "none");
        Assert.That(said, Is.Empty);
    }

    /// <summary>The object itself, in a configuration file.</summary>
    [Test]
    public void TheObjectMayStandInTheConfiguration()
    {
        string config = Path.Combine(_folder, "config.json");
        File.WriteAllText(config, "{\"model_name_or_path\": \".\", \"data_path\": \"rows.json\", "
            + $"\"deepspeed\": {Offload}}}");
        Assert.That(TrainReader.Read([config], _folder).OffloadParam, Is.True);
    }

    private TrainArguments Read(string? file, out List<string> said, params string[] over)
    {
        var lines = new List<string>();
        List<string> given = ["--model_name_or_path", ".", "--data_path", "rows.json"];
        if (file is not null)
        {
            File.WriteAllText(Path.Combine(_folder, "ds.json"), file);
            given.AddRange(["--deepspeed", "ds.json"]);
        }

        TrainArguments read = TrainReader.Read([.. given, .. over], _folder, lines.Add);
        said = lines;
        return read;
    }
}
