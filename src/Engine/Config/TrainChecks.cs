namespace MiniCpmNative.Engine.Config;

public sealed partial record TrainArguments
{
    /// <summary>Modules trained whole beside the adapters; empty without use_lora.</summary>
    public IReadOnlyList<string> TrainedWhole => (UseLora, ModulesToSave, OfficialCompat) switch
    {
        (false, _, _) => [],
        (true, { } names, _) => names,
        (true, null, true) => TuneVision
            ? ["embed_tokens", "resampler", "vpm"]
            : ["embed_tokens", "resampler"],
        _ => [],
    };

    /// <summary>Whether the decoder's linear layers are quantised on load.</summary>
    public bool Quantises => QLora || LoadIn4bit;

    /// <summary>The rows that are trained on: data_path without the share kept.</summary>
    public DataSources TrainingData => EvalSplit > 0
        ? DataPath! with { Share = new(EvalSplit, DataSeed ?? Seed, Evaluates: false) } : DataPath!;

    /// <summary>The rows of evaluations: eval_data_path, or the share kept of data_path.</summary>
    public DataSources? EvaluationData => EvalDataPath ?? (EvalSplit > 0
        ? DataPath! with { Share = new(EvalSplit, DataSeed ?? Seed, Evaluates: true) } : null);

    /// <summary>
    /// The logged value that the best checkpoint is best by; null where none is wanted.
    /// </summary>
    public string? BestBy => MetricForBestModel is { } metric
        ? BestNames.FirstOrDefault(name => name == metric || name == "eval_" + metric
            || name == "eval_generated_" + metric) ?? metric
        : LoadBestModelAtEnd ? BestNames[0] : null;

    internal IReadOnlyList<string> BestNames =>
    [
        "eval_loss", "eval_token_accuracy", "eval_answer_accuracy",
        .. EvalGenerate > 0 ? Metrics.Select(name => "eval_generated_" + name) : [],
    ];

    /// <summary>What is computed again in backward, both keys together.</summary>
    public Recompute Recomputes => GradientCheckpointing || Streams ? Recompute.Block : Recompute;

    /// <summary>Whether frozen layers lie in host memory, trained ones or not.</summary>
    public bool Streams => StreamWeights == StreamedWeights.True || OffloadParam == true;

    /// <summary>Whether frozen embeddings that are no head lie there.</summary>
    public bool EmbeddingsInHost => Streams || StreamWeights == StreamedWeights.Embeddings;

    /// <summary>The folder of the TensorBoard files.</summary>
    public string LogFolder => LoggingDir ?? Path.Combine(OutputDir, "runs");

    /// <summary>Warm-up steps of a run: warmup_steps, or a share of the run, rounded up.</summary>
    public int WarmupOf(int maxSteps)
    {
        if (WarmupSteps >= 1) return (int)WarmupSteps;
        return (int)Math.Ceiling(maxSteps * (WarmupSteps > 0 ? WarmupSteps : WarmupRatio));
    }
}

/// <summary>What only several keys together can be wrong about.</summary>
internal static class TrainChecks
{
    // Below it F32 loses bits, and some processors take it for 0.
    private const float SmallestNormal = 1.17549435e-38f;

    /// <summary>Keys that say more about q_lora, where it is not there; a model that is asked has
    /// them too.</summary>
    public static string? Unquantised(TrainArguments a) =>
        a.Quantises || (a.Bnb4bitQuantType is null && a.Bnb4bitUseDoubleQuant is null
            && a.LlmInt8SkipModules is null) ? null
        : "bnb_4bit_quant_type, bnb_4bit_use_double_quant and llm_int8_skip_modules need q_lora "
            + "(load_in_4bit)";

    /// <exception cref="InputException">Lists all contradictions.</exception>
    public static void Check(TrainArguments a)
    {
        var problems = new List<string>();
        void Refuse(bool when, string problem)
        {
            if (when) problems.Add(problem);
        }

        Refuse(a.ModelNameOrPath is null, "model_name_or_path is missing: the folder of the model");
        Refuse(a.DataPath is null, "data_path is missing: the file with the training rows");
        Refuse(a.Bf16 && a.Fp16, "bf16 and fp16 are both true, at most one can be");
        Refuse(a.GradientCheckpointing && a.Recompute is not (Recompute.Auto or Recompute.Block),
            "gradient_checkpointing recomputes every layer, "
            + $"recompute={TrainKeys.SnakeCase(a.Recompute.ToString())}"
            + " less: leave one of them out");
        Refuse(a.Streams && a.Recompute is not (Recompute.Auto or Recompute.Block),
            (a.StreamWeights == StreamedWeights.True ? "stream_weights" : "offload_param")
            + " recomputes every layer when its weights come back, "
            + $"recompute={TrainKeys.SnakeCase(a.Recompute.ToString())} less: leave one of them "
            + "out");
        Refuse(a.OffloadParam == true && a.StreamWeights is { } less and not StreamedWeights.True,
            "offload_param streams frozen layers too: leave stream_weights="
            + $"{TrainKeys.SnakeCase($"{a.StreamWeights}")} out");
        Refuse(a.UseLora && a.TuneLlm, "use_lora and tune_llm are both true: set tune_llm to false "
            + "(the language model then learns through its adapters)");
        Refuse(a.TuneAudio && !a.InitAudio, "tune_audio needs init_audio, which runs the encoder");
        Refuse(!a.UseLora && a.ModulesToSave is { Count: > 0 },
            "modules_to_save needs use_lora; without it tune_vision and tune_llm say what is "
                + "trained");
        Refuse(!a.UseLora && a.LoraLayerReplication is not null,
            "lora_layer_replication needs use_lora");
        Refuse(!a.UseLora && a.LoraWeightPath is not null, "lora_weight_path needs use_lora");
        Refuse(!a.UseLora && a.TrainableTokenIndices is not null,
            "trainable_token_indices needs use_lora");
        Refuse(!a.UseLora && a.TargetParameters is { Count: > 0 }, "target_parameters needs "
            + "use_lora");
        Refuse(a.TargetParameters is { Count: > 0 } && a.LoraDropout > 0,
            "target_parameters needs lora_dropout=0: adapters of experts' matrices drop nothing, "
            + "and PEFT does not load them otherwise");
        Refuse(a.LoraBias == LoraBias.True && a.UseDora,
            "lora_bias=true and use_dora do not go together: PEFT has no such adapter");
        string start = a.InitLoraWeights.Text;
        void RefuseSplit(bool when, string with) => Refuse(a.InitLoraWeights.Splits && when,
            $"init_lora_weights={start} takes adapters' starts out of the weights: {with}");
        RefuseSplit(a.UseDora, "DoRA's magnitudes are those of whole weights; leave use_dora out");
        RefuseSplit(a.Quantises, "with q_lora (load_in_4bit) what is left would be quantised "
            + "otherwise than the model; leave one of them out");
        RefuseSplit(a.LoraWeightPath is not null,
            "lora_weight_path starts from an adapter; leave one of them out");
        Refuse(a.Quantises && !a.UseLora, "q_lora (load_in_4bit) needs use_lora: 4-bit weights are "
            + "not trained themselves");
        if (Unquantised(a) is { } unused) problems.Add(unused);
        var computes = a.Bf16 ? ComputeType.Bfloat16 : a.Fp16 ? ComputeType.Float16
            : ComputeType.Float32;
        Refuse(a.Bnb4bitComputeDtype is { } type && type != computes,
            $"bnb_4bit_compute_dtype is not {TrainKeys.SnakeCase(computes.ToString())}, the type "
            + "of the run: set bf16 or fp16, or leave it out");
        Refuse(a.LoraLayersToTransform is not null && a.LoraTargetModules.Pattern is not null,
            "lora_layers_to_transform needs lora_target_modules as a list of names "
            + "(a regular expression names its layers itself)");
        Refuse(a.Evaluates && a.EvaluationData is null,
            "evaluation needs eval_data_path or eval_split (or set eval_strategy to no)");
        Refuse(a.BestBy is { } by && !a.BestNames.Contains(by),
            $"metric_for_best_model is {Messages.Quote(a.MetricForBestModel ?? "")}, expected one "
            + "of "
            + string.Join(", ", a.BestNames));
        Refuse(a.LoadBestModelAtEnd
            && (a.EvalStrategy == When.No || a.EvalStrategy != a.SaveStrategy),
            "load_best_model_at_end needs eval_strategy and save_strategy to be the same, steps or "
                + "epoch");
        Refuse(a.LoadBestModelAtEnd && a.EvalStrategy == When.Steps
            && a.SaveSteps.Value >= 1 && (a.EvalSteps ?? a.LoggingSteps).Value >= 1
            && a.SaveSteps.Value % (a.EvalSteps ?? a.LoggingSteps).Value != 0,
            "load_best_model_at_end needs save_steps to be a multiple of eval_steps");
        Refuse(a.GreaterIsBetter is not null && a.BestBy is null,
            "greater_is_better needs metric_for_best_model");
        Refuse(a.EvalSplit > 0 && a.EvalDataPath is not null,
            "eval_data_path and eval_split are both given: leave one of them out");
        Refuse(a.EvalSplit >= 1 && a.EvalSplit != Math.Floor(a.EvalSplit),
            $"eval_split is {a.EvalSplit}, expected a whole number of rows, or a share below 1");
        Refuse(a.OfficialCompat && a.TrainOn != TrainOn.All,
            "official_compat learns every answer: leave train_on out");
        Refuse(a.LoraLayersPattern is { Count: > 0 } && a.LoraLayersToTransform is null,
            "lora_layers_pattern needs lora_layers_to_transform");
        Refuse(a.LoraplusLrRatio is not null && !a.UseLora, "loraplus_lr_ratio needs use_lora");
        Refuse(a.LearningRate == 0 && a.LearningRates is { Count: > 0 },
            "learning_rates needs a learning_rate above 0, of which they are multiples over time");
        Refuse(a.LrSchedulerType == LrSchedule.WarmupLr && a.LearningRates is { Count: > 0 },
            "learning_rates means nothing to DeepSpeed's warmup_lr, which has one rate for all");
        foreach (var (pattern, rank) in a.RankPattern?.List ?? [])
            Refuse(rank != Math.Floor(rank),
                FormattableString.Invariant($"rank_pattern \"{pattern}\" is {rank}, ")
                + "expected a whole number");
        Refuse(a.EvalGenerate > 0 && !a.Evaluates,
            "eval_generate needs evaluations: set eval_strategy");
        Refuse(a.OverwriteOutputDir && a.ResumeFromCheckpoint is not null,
            "overwrite_output_dir and resume_from_checkpoint contradict each other");
        Refuse(a.WarmupSteps >= 1 && a.WarmupSteps != Math.Floor(a.WarmupSteps),
            $"warmup_steps is {a.WarmupSteps}, expected a whole number, or a share of all steps "
                + "below 1");
        Refuse((float)a.AdamEpsilon < SmallestNormal,
            FormattableString.Invariant($"adam_epsilon is {a.AdamEpsilon}, which is 0 in 32 bits: ")
            + "where a gradient is 0, as in every new adapter, its step would be 0 / 0; Adam's "
            + "usual value is 1e-8");
        Refuse(a.UseLora && (float)(a.LoraAlpha / a.LoraR) < SmallestNormal,
            FormattableString.Invariant($"lora_alpha is {a.LoraAlpha}, with which adapters are ")
            + "multiplied by 0 in 32 bits and learn nothing; usual values are lora_r and twice of "
            + "it");
        foreach (string key in a.AllowChanges ?? [])
            Refuse(!TrainKeys.Train.Any(known => known.Name == key), "allow_changes: there is no "
                + "key "
                + Messages.Quote(key) + TrainKeys.Guess(key, TrainKeys.Train.Select(k => k.Name)));
        Refuse(a.AllowChanges is { Count: > 0 } && a.ResumeFromCheckpoint is null,
            "allow_changes needs resume_from_checkpoint: a new run has nothing to differ from");
        Schedule(a, problems);
        if (problems.Count > 0) throw new InputException(string.Join("; ", problems));
    }

    private static void Schedule(TrainArguments a, List<string> problems)
    {
        var (options, plain) = (a.LrSchedulerKwargs, new ScheduleOptions());
        var type = a.LrSchedulerType;
        void Need(bool differs, string name, bool used)
        {
            if (differs && !used)
            {
                problems.Add($"lr_scheduler_kwargs: {name} means nothing to lr_scheduler_type "
                    + TrainKeys.SnakeCase(type.ToString()));
            }
        }

        bool lowest = type == LrSchedule.CosineWithMinLr;
        bool waves = lowest || type is LrSchedule.Cosine or LrSchedule.CosineWithRestarts;
        Need(options.NumCycles is not null, "num_cycles", waves);
        Need(options.MinLr is not null, "min_lr", lowest);
        Need(options.MinLrRate is not null, "min_lr_rate", lowest);
        if (lowest && options.MinLr is null == options.MinLrRate is null)
            problems.Add("lr_scheduler_kwargs: cosine_with_min_lr wants one of min_lr and "
                + "min_lr_rate");
        if (options.MinLr > a.LearningRate)
            problems.Add($"lr_scheduler_kwargs: min_lr {options.MinLr} must not be above "
                + $"learning_rate {a.LearningRate}");
        Need(options.Power != plain.Power, "power", type == LrSchedule.Polynomial);
        Need(options.LrEnd != plain.LrEnd, "lr_end", type == LrSchedule.Polynomial);
        Need(options.Timescale is not null, "timescale", type == LrSchedule.InverseSqrt);
        Need(options.WarmupMinLr != 0, "warmup_min_lr", type == LrSchedule.WarmupLr);
        Need(options.WarmupType != WarmupCurve.Log, "warmup_type", type == LrSchedule.WarmupLr);
        if (type == LrSchedule.Polynomial && options.LrEnd >= a.LearningRate)
        {
            problems.Add($"lr_scheduler_kwargs: lr_end {options.LrEnd} must be below "
                + $"learning_rate {a.LearningRate}");
        }

        if (type == LrSchedule.WarmupLr && options.WarmupMinLr > a.LearningRate)
        {
            problems.Add(
                $"lr_scheduler_kwargs: warmup_min_lr {options.WarmupMinLr} must not be above "
                + $"learning_rate {a.LearningRate}");
        }
    }
}
