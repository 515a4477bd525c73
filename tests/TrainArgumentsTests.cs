using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

public sealed class TrainArgumentsTests
{
    // The flags of the official finetune_lora.sh and finetune_ds.sh, in their order.
    private const string OfficialLora =
        "--model_name_or_path model --llm_type qwen --data_path train.json --eval_data_path "
        + "eval.json "
        + "--remove_unused_columns false --label_names labels --prediction_loss_only false "
        + "--bf16 false --bf16_full_eval false --fp16 true --fp16_full_eval true --do_train "
        + "--do_eval --tune_vision true --tune_llm false --use_lora true "
        + "--lora_target_modules llm\\..*layers\\.\\d+\\.self_attn\\.(q_proj|k_proj|v_proj|o_proj) "
        + "--model_max_length 2048 --max_slice_nums 9 --max_steps 10000 --eval_steps 1000 "
        + "--output_dir output/output_lora --logging_dir output/output_lora --logging_strategy "
        + "steps --per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
        + "--gradient_accumulation_steps 1 --evaluation_strategy steps --save_strategy steps "
        + "--save_steps 1000 --save_total_limit 10 --learning_rate 1e-6 --weight_decay 0.1 "
        + "--adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 "
        + "--gradient_checkpointing true --deepspeed ds_config_zero2.json --report_to tensorboard";

    private const string OfficialFull =
        "--model_name_or_path model --llm_type qwen --data_path train.json --eval_data_path "
        + "eval.json "
        + "--remove_unused_columns false --label_names labels --prediction_loss_only false "
        + "--bf16 true --bf16_full_eval true --fp16 false --fp16_full_eval false --do_train "
        + "--do_eval "
        + "--tune_vision true --tune_llm false --model_max_length 2048 --max_slice_nums 9 "
        + "--max_steps 10000 --eval_steps 1000 --output_dir output/output_lora "
        + "--logging_dir output/output_lora --logging_strategy steps "
        + "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
        + "--gradient_accumulation_steps 1 --eval_strategy steps --save_strategy steps "
        + "--save_steps 1000 --save_total_limit 10 --learning_rate 1e-6 --weight_decay 0.1 "
        + "--adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 "
        + "--gradient_checkpointing true --deepspeed ds_config_zero3.json --report_to tensorboard";

    private const string Least = "--model_name_or_path m --data_path d.json ";
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void OfficialLoraCommandLineMovesOverUnchanged()
    {
        var notices = new List<string>();
        var a = Read(OfficialLora, notices);
        Assert.Multiple(() =>
        {
            Assert.That(a.ModelNameOrPath, Is.EqualTo(Path.Combine(_folder, "model")));
            Assert.That(a.LogFolder, Is.EqualTo(Path.Combine(_folder, "output/output_lora")));
            Assert.That((a.Fp16, a.Bf16, a.UseLora, a.TuneLlm, a.TuneVision),
                Is.EqualTo((true, false, true, false, true)));
            Assert.That(a.LearningRate, Is.EqualTo(1e-6));
            Assert.That(a.LrSchedulerType, Is.EqualTo(LrSchedule.Cosine));
            Assert.That(a.WarmupOf(a.MaxSteps), Is.EqualTo(100));
            Assert.That(a.EvalStrategy, Is.EqualTo(When.Steps));
            Assert.That(a.EvalSteps, Is.EqualTo(new Interval(1000)));
            Assert.That((a.LoraR, a.LoraAlpha, a.LoraDropout), Is.EqualTo((64, 64.0, 0.05)));
            Assert.That(a.LoraTargetModules.Matches("llm.model.layers.3.self_attn.o_proj"));
            Assert.That(a.LoraTargetModules.Matches("llm.model.layers.3.self_attn.o_proj.x"),
                Is.False);
            Assert.That(a.TrainedWhole, Is.Empty);
            Assert.That((a with { OfficialCompat = true }).TrainedWhole,
                Is.EqualTo(["embed_tokens", "resampler", "vpm"]));
        });
        Assert.That(notices, Has.Count.EqualTo(3));
        Assert.That(notices[0], Does.StartWith("deepspeed is not used").And.Contain("warmup_lr"));
        Assert.That(notices[1], Does.EndWith("bf16_full_eval, do_eval, do_train, fp16_full_eval, "
            + "label_names, prediction_loss_only, remove_unused_columns"));
        Assert.That(notices[2], Does.StartWith("tune_vision trains nothing"));
    }

    [Test]
    public void OfficialFullCommandLineMovesOverUnchanged()
    {
        var a = Read(OfficialFull, []);
        Assert.That((a.Bf16, a.UseLora, a.TuneLlm, a.TuneVision),
            Is.EqualTo((true, false, false, true)));
        Assert.That(a.EvalStrategy, Is.EqualTo(When.Steps));
        Assert.That(a.SaveTotalLimit, Is.EqualTo(10));
    }

    [Test]
    public void ArgumentsOverrideTheFileAndPathsStartWhereTheyWereGiven()
    {
        Directory.CreateDirectory(Path.Combine(_folder, "sub"));
        File.WriteAllText(
            Path.Combine(_folder, "sub/c.json"),
            """{"model_name_or_path": "m", "data_path": "../d.json", "seed": 1, "bf16": true}""");
        var a = Read(
            "sub/c.json --seed=7 --eval-data-path e.json --gradient_checkpointing --seed 8", []);
        Assert.Multiple(() =>
        {
            Assert.That(a.ModelNameOrPath, Is.EqualTo(Path.Combine(_folder, "sub/m")));
            Assert.That($"{a.DataPath}", Is.EqualTo(Path.Combine(_folder, "d.json")));
            Assert.That($"{a.EvalDataPath}", Is.EqualTo(Path.Combine(_folder, "e.json")));
            Assert.That(a.OutputDir, Is.EqualTo(Path.Combine(_folder, "trainer_output")));
            Assert.That(a.Seed, Is.EqualTo(8), "the last one counts");
            Assert.That((a.Bf16, a.GradientCheckpointing), Is.EqualTo((true, true)));
        });
    }

    [TestCase("--lora_rank 8", "\"lora_rank\" is not used here: set lora_r")]
    [TestCase("--learning_reat 8 --sede 1", "unknown key \"learning_reat\" (did you mean "
        + "\"learning_rate\"?); unknown key \"sede\" (did you mean \"seed\"?)")]
    [TestCase("--learning_rate -1", "learning_rate is \"-1\", expected a number at least 0")]
    [TestCase("--learning_rate nan", "learning_rate is \"nan\", expected a number at least 0")]
    [TestCase("--learning_rate 1e999", "learning_rate is \"1e999\", expected a number at least 0")]
    [TestCase("--learning_rate 0x1", "learning_rate is \"0x1\", expected a number")]
    [TestCase("--learning_rate", "learning_rate has no value, expected a number")]
    [TestCase("--seed 1 2", "seed is \"1 2\", expected one value")]
    [TestCase("--seed 1.5", "seed is \"1.5\", expected a whole number at least 0")]
    [TestCase("--max_steps 99999999999", "at least -1 and at most 2147483647")]
    [TestCase("--lora_dropout 1",
        "lora_dropout is \"1\", expected a number at least 0 and below 1")]
    [TestCase("--adam_beta2 1", "adam_beta2 is \"1\", expected a number at least 0 and below 1")]
    [TestCase("--save_steps 0", "save_steps is \"0\", expected a number above 0")]
    [TestCase("--save_steps 1.5", "save_steps is \"1.5\", expected a whole number of steps")]
    [TestCase("--bf16 maybe", "bf16 is \"maybe\", expected true or false")]
    [TestCase("--bf16 --fp16", "bf16 and fp16 are both true")]
    [TestCase("--use_lora", "use_lora and tune_llm are both true")]
    [TestCase("--eval_strategy steps", "evaluation needs eval_data_path")]
    [TestCase("--modules_to_save resampler", "modules_to_save needs use_lora")]
    [TestCase("--lr_scheduler_type wave", "expected linear, cosine, cosine_with_restarts")]
    [TestCase("--lr_scheduler_kwargs {\"power\":2}",
        "power means nothing to lr_scheduler_type linear")]
    [TestCase("--lr_scheduler_kwargs {\"powr\":2}",
        "unknown key \"powr\" (did you mean \"power\"?)")]
    [TestCase("--lora_target_modules (", "lora_target_modules: \"(\" is not a regular expression")]
    [TestCase("--use_lora --tune_llm false --lora_layers_to_transform 1",
        "needs lora_target_modules")]
    [TestCase("--q_lora true", "q_lora (load_in_4bit) needs use_lora")]
    [TestCase("--load_in_8bit true", "load_in_8bit = \"true\" is not supported")]
    [TestCase("--bnb_4bit_quant_type fp4", "need q_lora")]
    [TestCase("--bnb_4bit_compute_dtype bfloat16", "bnb_4bit_compute_dtype is not float32")]
    [TestCase("--optim rmsprop", "optim is \"rmsprop\", expected adamw_torch")]
    [TestCase("--optim galore_adamw_8bit", "gradients of low rank are LoRA's")]
    [TestCase("--optim schedule_free_adamw", "lr_scheduler_type=constant")]
    [TestCase("--optim adamw_hf", "; adamw_torch is the same")]
    [TestCase("--report_to wandb", "report_to is \"wandb\", expected tensorboard")]
    [TestCase("--group_by_length", "train_sampling_strategy is random or sequential")]
    [TestCase("--use_cpu", "is spelt device=cpu here")]
    [TestCase("--eval_strategy no --evaluation_strategy=steps", "evaluation needs eval_data_path")]
    [TestCase("--output_dir=", "output_dir is \"\", expected a text that is not empty")]
    [TestCase("--data_path=", "data_path is missing")]
    public void WrongArgumentsAreNamed(string arguments, string message)
    {
        var problem = Assert.Throws<InputException>(() => Read(Least + arguments, []));
        Assert.That(problem!.Message, Does.Contain(message).And.Not.Contain("\n"));
    }

    [TestCase("-x")]
    [TestCase("x --seed=1")]
    [TestCase("--seed=1 x")]
    [TestCase("--seed=1 --")]
    [TestCase("missing.json")]
    [TestCase(".")]
    public void StrayArgumentsAreRefused(string arguments) =>
        Assert.That(() => Read(arguments, []), Throws.TypeOf<InputException>());

    [TestCase("adamw_8bit", OptimizerKind.Adamw8bit)]
    [TestCase("adamw_bnb_8bit", OptimizerKind.AdamwBnb8bit)]
    [TestCase("paged_adamw_32bit", OptimizerKind.PagedAdamw32bit)]
    [TestCase("lion_8bit", OptimizerKind.Lion8bit)]
    public void OptimizersHaveTheNamesOfHuggingFace(string name, OptimizerKind expected)
    {
        TrainArguments arguments = Read(Least + "--optim " + name, []);
        Assert.That(arguments.Optim, Is.EqualTo(expected));
        Assert.That(Encoding.UTF8.GetString(TrainWriter.ToJson(arguments)),
            Does.Contain($"\"optim\": \"{name}\""));
    }

    [TestCase("--tune_vision", true)]
    [TestCase("--tune_vision True", true)]
    [TestCase("--tune_vision 1", true)]
    [TestCase("--tune_vision=false", false)]
    [TestCase("--tune_vision 0", false)]
    public void BooleansHaveTheSpellingsOfArgparse(string argument, bool expected) =>
        Assert.That(Read(Least + argument, []).TuneVision, Is.EqualTo(expected));

    [TestCase("--optim adamw_torch --q_lora false --label_smoothing_factor 0.0 "
        + "--lora_layers_pattern=")]
    [TestCase("--push_to_hub False --past_index -1 --group_by_length false --save_safetensors "
        + "true")]
    public void NeutralValuesOfUnsupportedKeysAreAccepted(string arguments) =>
        Assert.That(() => Read(Least + arguments, []), Throws.Nothing);

    [Test]
    public void ListsComeAsWordsOrJson()
    {
        const string lora = Least + "--use_lora --tune_llm false --lora_layers_to_transform ";
        var words = Read(lora
            + "1 2 --lora_target_modules q_proj v_proj --modules_to_save resampler", []);
        var json = Read(lora + "[1,2] --lora_target_modules [\"q_proj\",\"v_proj\"] "
            + "--modules_to_save [\"resampler\"]", []);
        foreach (var a in new[] { words, json })
        {
            Assert.That(a.LoraLayersToTransform, Is.EqualTo([1, 2]));
            Assert.That(a.LoraTargetModules.Suffixes, Is.EqualTo(["q_proj", "v_proj"]));
            Assert.That(a.TrainedWhole, Is.EqualTo(["resampler"]));
            Assert.That(a.LoraTargetModules.Matches("vpm.encoder.layers.0.self_attn.q_proj"));
            Assert.That(a.LoraTargetModules.Matches("q_proj"));
            Assert.That(a.LoraTargetModules.Matches("x.my_q_proj"), Is.False, "ends after a dot");
        }
    }

    [TestCase("steps", 0, 1000, 0)]
    [TestCase("steps", 0.015, 1000, 15)]
    [TestCase("steps", 7, 1000, 7)]
    [TestCase("ratio", 0.0151, 1000, 16)]
    public void WarmupIsStepsOrAShareRoundedUp(string key, double value, int total, int expected)
    {
        var a = key == "steps"
            ? new TrainArguments { WarmupSteps = value }
            : new TrainArguments { WarmupRatio = value };
        Assert.That(a.WarmupOf(total), Is.EqualTo(expected));
    }

    [Test]
    public void ResolvedConfigurationRunsAgain()
    {
        string changed = OfficialLora.Replace("--report_to tensorboard", "--report_to none")
            + " --lora_layers_to_transform 0 1 --lora_target_modules q_proj k_proj --threads 3"
            + " --resume_from_checkpoint true --modules_to_save vpm --save_steps 0.25 --run_name é"
            + " --lr_scheduler_kwargs {\"num_cycles\":0.75} --data_seed 5 --disable_tqdm";
        var first = Read(changed, []);
        string path = Path.Combine(_folder, "again.json");
        File.WriteAllBytes(path, TrainWriter.ToJson(first));
        var second = Read("again.json", []);
        Assert.That(TrainWriter.ToJson(second), Is.EqualTo(TrainWriter.ToJson(first)));
        Assert.That(second.ResumeFromCheckpoint, Is.EqualTo(new ResumePoint(null)));
        Assert.That(second.LrSchedulerKwargs.NumCycles, Is.EqualTo(0.75));
        using var json = JsonDocument.Parse(File.ReadAllBytes(path));
        var keys = json.RootElement.EnumerateObject().Select(p => p.Name).ToArray();
        Assert.That(keys, Has.Length.EqualTo(typeof(TrainArguments).GetProperties()
            .Count(p => p.IsDefined(typeof(KeyAttribute), false))));
        foreach (string key in keys) Assert.That(TrainWriter.Help(), Does.Contain($"--{key}"));
    }

    [Test]
    public void HelpFitsTheScreen()
    {
        foreach (string line in TrainWriter.Help().Split('\n'))
            Assert.That(line, Has.Length.LessThanOrEqualTo(100));
    }

    [TestCase("lora_rank", "lora_r", 3)]
    [TestCase("abc", "acb", 1)]
    [TestCase("", "ab", 2)]
    [TestCase("kitten", "sitting", 3)]
    public void EditDistance(string a, string b, int expected) =>
        Assert.That(TrainKeys.Distance(a, b), Is.EqualTo(expected));

    [Test]
    public void TenThousandMutatedFilesAndArgumentsNeverCrash()
    {
        var random = new Random(20);
        string path = Path.Combine(_folder, "c.json");
        byte[] whole = TrainWriter.ToJson(Read(OfficialLora, []));
        string[] words = OfficialLora.Split(' ');
        string[] odd =
            ["", "--", "-1", "NaN", "1e400", "[", "{}", "\0", "\ud800", "a\nb", "null", "=",
            "--=", "--x", "9223372036854775808", "[\"", "{\"a\":1}", "(?", "true", "--seed=",
            "../.."];
        int accepted = 0;
        for (int i = 0; i < 12_000; i++)
        {
            string[] arguments;
            if (i % 2 == 0)
            {
                File.WriteAllBytes(path, Mutate(whole, random));
                arguments = ["c.json"];
            }
            else
            {
                arguments = [.. words];
                for (int k = random.Next(1, 4); k > 0; k--)
                {
                    int at = random.Next(arguments.Length);
                    arguments[at] = random.Next(3) == 0
                        ? Encoding.UTF8.GetString(
                            Mutate(Encoding.UTF8.GetBytes(arguments[at]), random))
                        : odd[random.Next(odd.Length)];
                }
            }

            try
            {
                TrainReader.Read(arguments, _folder);
                accepted++;
            }
            catch (InputException problem)
            {
                Assert.That(problem.Message,
                    Is.Not.Empty.And.Not.Contain("\n").And.Not.Contain("\r"));
            }
        }

        Assert.That(accepted, Is.InRange(1, 11_000),
            "mutations are neither all harmless nor all fatal");
    }

    private static byte[] Mutate(byte[] original, Random random)
    {
        var bytes = original.ToList();
        for (int k = random.Next(1, 4); k > 0 && bytes.Count > 0; k--)
        {
            int at = random.Next(bytes.Count);
            switch (random.Next(5))
            {
                case 0: bytes[at] = (byte)random.Next(256); break;
                case 1:
                    bytes.RemoveRange(at,
                    random.Next(Math.Min(20, bytes.Count - at)) + 1); break;
                case 2:
                    bytes.InsertRange(at,
                    bytes.GetRange(at, random.Next(Math.Min(40, bytes.Count - at)))); break;
                case 3: bytes.Insert(at, (byte)"{}[]\",:0-e.tnf"[random.Next(14)]); break;
                default: if (random.Next(20) == 0) bytes.RemoveRange(at, bytes.Count - at); break;
            }
        }

        return [.. bytes];
    }

    private TrainArguments Read(string arguments, List<string> notices) => TrainReader.Read(
        arguments.Split(' ', StringSplitOptions.RemoveEmptyEntries), _folder, notices.Add);
}
