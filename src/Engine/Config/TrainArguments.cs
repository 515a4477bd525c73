namespace MiniCpmNative.Engine.Config;

/// <summary>
/// A training configuration under the names of the official script and of Hugging Face's
/// TrainingArguments: a property's key is its name in snake_case. This record is the only table of
/// keys: defaults, ranges and help texts stand here once; reading (<see cref="TrainReader"/>),
/// writing and --help are generated from it. Defaults are the official script's where it sets one,
/// else Hugging Face's, except where the comment says why not.
/// </summary>
public sealed partial record TrainArguments
{
    /// <summary>Most frames of a second that are shown (video_stack_frames).</summary>
    public const int MostStacked = 60;

    [Key("Model", "folder of the model in Hugging Face's layout", Path = true, SameBits = true)]
    public string? ModelNameOrPath { get; init; }

    [Key("Model", "prompt family (minicpm, llama3, qwen); normally taken from the model")]
    public string? LlmType { get; init; }

    [Key("Model", "tokens of one row; longer rows are cut", Min = 1)]
    public int ModelMaxLength { get; init; } = 2048;

    [Key("Model", "most tiles that one picture is sliced into", Min = 1, Max = 1000)]
    public int MaxSliceNums { get; init; } = 9;

    [Key("Model", "frames that are taken of a second of video; the model's own number when not "
        + "given", Max = 1000, Open = true)]
    public double? VideoFps { get; init; }

    [Key("Model", "most frames of a video, where frames are joined, groups of them; the model's "
        + "own number when not given", Min = 1, Max = 1 << 16)]
    public int? VideoMaxFrames { get; init; }

    [Key("Model", "most tiles that one frame is sliced into; the model's own number when not given",
        Min = 1, Max = 1000)]
    public int? VideoMaxSliceNums { get; init; }

    [Key("Model", "frames that become one picture's features together, of models that join frames; "
        + "by the video's length when not given", Min = 1, Max = 6)]
    public int? VideoPacking { get; init; }

    [Key("Model", "frames of a second of video: the first is a picture, those up to the next are "
        + "one more, of models that show them so; the model's own number when not given", Min = 1,
        Max = MostStacked)]
    public int? VideoStackFrames { get; init; }

    [Key("Model", "weights and what is saved are bfloat16")]
    public bool Bf16 { get; init; }

    [Key("Model", "weights and what is saved are float16")]
    public bool Fp16 { get; init; }

    [Key("Model", "auto, cpu or cuda; auto takes CUDA when it is there", SameBits = true)]
    public DeviceChoice Device { get; init; }

    [Key("Model", "most GPU memory that the run takes: 24GiB, 24GB, or below 1 a share of the "
        + "card; what is free when not given", SameBits = true)]
    public MemoryLimit? MemoryLimit { get; init; }

    [Key("Model", "frozen layers stay in the machine's memory and pass through two buffers of the "
        + "GPU while it computes: true, false, or embeddings for these alone; when not given, "
        + "where the run does not fit otherwise", SameBits = true)]
    public StreamedWeights? StreamWeights { get; init; }

    [Key("Model", "what the optimizer alone reads, moments and masters of 16-bit weights, lies in "
        + "the machine's memory: true, false; when not given, where the run does not fit otherwise",
        SameBits = true)]
    public bool? OffloadOptimizer { get; init; }

    [Key("Model", "trained layers and their gradients lie in the machine's memory too and pass "
        + "through the GPU with stream_weights' buffers; embeddings stay there: true, false; when "
        + "not given, where the run does not fit otherwise", SameBits = true)]
    public bool? OffloadParam { get; init; }

    [Key("Model", "on a GPU, products of float32 in TF32: faster, with 10 bits of mantissa")]
    public bool Tf32 { get; init; }

    [Key("Model", "threads of the CPU device; all processors when not given", Min = 1, Max = 4096,
        SameBits = true)]
    public int? Threads { get; init; }

    [Key("Data", "training rows: files, folders, patterns with *, dataset_info.json#NAME",
        Path = true,
        SameBits = true)]
    public DataSources? DataPath { get; init; }

    [Key("Data", "evaluation rows, as data_path", Path = true, SameBits = true)]
    public DataSources? EvalDataPath { get; init; }

    [Key("Data", "rows of data_path kept for evaluation, drawn by data_seed; below 1 a share of "
        + "all")]
    public double EvalSplit { get; init; }

    [Key("Data", "answers of a row that are learned: all, or last, those behind the last question")]
    public TrainOn TrainOn { get; init; }

    [Key("Data", "boxes of \"objects\": text, [(x1,y1),(x2,y2)], or tokens, <box>x1 y1 x2 "
        + "y2</box>")]
    public BoxFormat BoxFormat { get; init; }

    [Key("Data", "error refuses a file with bad rows, skip lists and leaves them out",
        SameBits = true)]
    public BadRows OnBadRow { get; init; }

    [Key("Data", "tokens, labels and modules_to_save exactly as the official training script")]
    public bool OfficialCompat { get; init; }

    [Key("Data", "turn pictures as their EXIF data says (the official code does not)")]
    public bool ApplyExifOrientation { get; init; }

    [Key("Data", "order of the rows: random or sequential")]
    public SamplingStrategy TrainSamplingStrategy { get; init; }

    [Key("Data", "leave out the last batch of an epoch when it is not full")]
    public bool DataloaderDropLast { get; init; }

    // Hugging Face's default 0 decodes inside the training loop; nobody wants that.
    [Key("Data", "threads that decode and tokenise ahead; chosen when not given", Max = 1024,
        SameBits = true)]
    public int? DataloaderNumWorkers { get; init; }

    [Key("Trained parts", "train the vision tower (with use_lora: see modules_to_save)")]
    public bool TuneVision { get; init; } = true;

    [Key("Trained parts", "run the model's audio encoder (MiniCPM-o), which rows with audio need")]
    public bool InitAudio { get; init; }

    [Key("Trained parts", "train the audio encoder (with use_lora: name apm and "
        + "audio_projection_layer in modules_to_save)")]
    public bool TuneAudio { get; init; }

    [Key("Trained parts", "train the language model; not together with use_lora")]
    public bool TuneLlm { get; init; } = true;

    [Key("Trained parts", "train low-rank adapters instead of the weights")]
    public bool UseLora { get; init; }

    [Key("Trained parts", "the decoder's linear layers in 4 bits, quantised on load, and adapters "
        + "on them (load_in_4bit is the same); a quantised model is taken as it is without it")]
    public bool QLora { get; init; }

    [Key("Trained parts", "the same as q_lora", Name = "load_in_4bit")]
    public bool LoadIn4bit { get; init; }

    // Hugging Face's default fp4 without double quantisation is worse at the same size.
    [Key("Trained parts", "table of 4-bit values: nf4 (when not given) or fp4",
        Name = "bnb_4bit_quant_type")]
    public QuantType? Bnb4bitQuantType { get; init; }

    [Key("Trained parts", "quantise the scales of 4-bit values too: true when not given",
        Name = "bnb_4bit_use_double_quant")]
    public bool? Bnb4bitUseDoubleQuant { get; init; }

    [Key("Trained parts", "modules that q_lora does not quantise: list of names; when not given "
        + "all but the decoder, [lm_head, resampler] takes the vision tower too")]
    public IReadOnlyList<string>? LlmInt8SkipModules { get; init; }

    [Key("Trained parts", "type that products with 4-bit weights are computed in: that of bf16 and "
        + "fp16, else float32", Name = "bnb_4bit_compute_dtype")]
    public ComputeType? Bnb4bitComputeDtype { get; init; }

    [Key("Trained parts", "rank of the adapters", Min = 1, Max = 65536)]
    public int LoraR { get; init; } = 64;

    [Key("Trained parts", "adapter outputs are scaled by lora_alpha / lora_r", Open = true)]
    public double LoraAlpha { get; init; } = 64;

    [Key("Trained parts", "adapter outputs are scaled by lora_alpha / sqrt(lora_r)")]
    public bool UseRslora { get; init; }

    [Key("Trained parts", "dropout of the adapters' input", Below = 1)]
    public double LoraDropout { get; init; } = 0.05;

    [Key("Trained parts", "rows of the adapted weights have trained magnitudes (DoRA)")]
    public bool UseDora { get; init; }

    [Key("Trained parts", "ranks of single modules: object of regular expressions for a name or "
        + "its end, the first that matches counts", Min = 1, Max = 65536)]
    public NumbersByName? RankPattern { get; init; }

    [Key("Trained parts", "lora_alpha of single modules, as rank_pattern", Open = true)]
    public NumbersByName? AlphaPattern { get; init; }

    [Key("Trained parts", "modules with adapters: regular expression, list of name endings, or "
        + "all-linear")]
    public TargetModules LoraTargetModules { get; init; } =
        new(@"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)");

    [Key("Trained parts", "modules without adapters all the same: as lora_target_modules")]
    public TargetModules? ExcludeModules { get; init; }

    [Key("Trained parts", "biases that are trained too: none, all or lora_only; true: one of each "
        + "lora_B (PEFT's lora_bias)")]
    public LoraBias LoraBias { get; init; }

    [Key("Trained parts", "tokens whose rows of the embedding are trained beside the adapters: "
        + "list of ids, or object of modules (embed_tokens, lm_head) with such lists")]
    public TokenIndices? TrainableTokenIndices { get; init; }

    [Key("Trained parts", "experts' matrices with adapters (PEFT's target_parameters): list of "
        + "name endings, mlp.experts.gate_up_proj, mlp.experts.down_proj")]
    public IReadOnlyList<string>? TargetParameters { get; init; }

    [Key("Trained parts", "only these layers get adapters: number or list")]
    public IReadOnlyList<int>? LoraLayersToTransform { get; init; }

    [Key("Trained parts", "what stands before the number of such a layer: regular expressions; "
        + "anything when not given")]
    public IReadOnlyList<string>? LoraLayersPattern { get; init; }

    [Key("Trained parts", "ranges of the decoder's layers that run one after the other, each copy "
        + "with adapters of its own: [[0, 3], [2, 4]]")]
    public LayerRanges? LoraLayerReplication { get; init; }

    [Key("Trained parts", "how adapters start: true (B is zero), gaussian (the same with another "
        + "A), false (B is not zero), pissa, pissa_niter_N, olora (as a part of their weights)")]
    public LoraStart InitLoraWeights { get; init; } = new("true");

    [Key("Trained parts", "adapter folder to start from: its rank, alpha, targets and biases stay; "
        + "lora_dropout may change, modules_to_save may name more", Path = true, SameBits = true)]
    public string? LoraWeightPath { get; init; }

    [Key("Trained parts", "modules trained whole beside the adapters: list of names")]
    public IReadOnlyList<string>? ModulesToSave { get; init; }

    [Key("Trained parts", "recompute each layer in the backward pass to save memory: "
        + "recompute=block",
        SameBits = true)]
    public bool GradientCheckpointing { get; init; }

    [Key("Trained parts", "what is recomputed: nothing, norms, mlp (and norms), block, or auto: on "
        + "a GPU as little as fits into its memory", SameBits = true)]
    public Recompute Recompute { get; init; }

    [Key("Optimisation", "passes over the data", Open = true, Max = 1e6, SameBits = true)]
    public double NumTrainEpochs { get; init; } = 3;

    [Key("Optimisation", "optimizer steps; above 0 it overrides num_train_epochs", Min = -1,
        SameBits = true)]
    public int MaxSteps { get; init; } = -1;

    [Key("Optimisation", "rows of one forward pass", Min = 1, Max = 1 << 20)]
    public int PerDeviceTrainBatchSize { get; init; } = 8;

    [Key("Optimisation", "rows of one forward pass in evaluation", Min = 1, Max = 1 << 20,
        SameBits = true)]
    public int PerDeviceEvalBatchSize { get; init; } = 8;

    [Key("Optimisation", "forward passes of one optimizer step", Min = 1, Max = 1 << 20)]
    public int GradientAccumulationSteps { get; init; } = 1;

    [Key("Optimisation", "loss is divided by: tokens (of the whole step) or micro_batch_mean")]
    public LossNormalization LossNormalization { get; init; }

    [Key("Optimisation", "peak learning rate", Max = 1e6)]
    public double LearningRate { get; init; } = 5e-5;

    [Key("Optimisation", "peak learning rates of single tensors: object of vision, joiner, "
        + "decoder, "
        + "audio, embeddings (the head too) or regular expressions for a part of the name; the "
        + "first that matches counts", Max = 1e6)]
    public NumbersByName? LearningRates { get; init; }

    [Key("Optimisation", "B of adapters, and trained vectors, learn so many times faster (LoRA+)",
        Open = true, Max = 1e6)]
    public double? LoraplusLrRatio { get; init; }

    [Key("Optimisation", "linear, cosine, cosine_with_restarts, cosine_with_min_lr, polynomial, "
        + "constant, constant_with_warmup, inverse_sqrt, warmup_lr (DeepSpeed's)")]
    public LrSchedule LrSchedulerType { get; init; }

    [Key("Optimisation",
        "object: num_cycles, min_lr, min_lr_rate, power, lr_end, timescale, warmup_min_lr, "
        + "warmup_type")]
    public ScheduleOptions LrSchedulerKwargs { get; init; } = new();

    [Key("Optimisation", "steps of warm-up; below 1 a share of all steps", Max = int.MaxValue)]
    public double WarmupSteps { get; init; }

    [Key("Optimisation", "share of all steps for warm-up, when warmup_steps is 0", Max = 1)]
    public double WarmupRatio { get; init; }

    [Key("Optimisation", "adamw_torch (adamw_torch_fused), adamw_bf16 (moments in bfloat16), "
        + "adamw_8bit (adamw_bnb_8bit), paged_adamw_8bit, paged_adamw_32bit (paged_adamw): paged "
        + "ones lie in the machine's memory; lion_32bit (lion), lion_8bit, paged_lion_32bit, "
        + "paged_lion_8bit; sgd; adafactor")]
    public OptimizerKind Optim { get; init; }

    [Key("Optimisation", "decoupled weight decay", Max = 1e6)]
    public double WeightDecay { get; init; }

    [Key("Optimisation", "weight decay of single tensors, as learning_rates, of what decays at all",
        Max = 1e6)]
    public NumbersByName? WeightDecays { get; init; }

    [Key("Optimisation", "what decays: hf (not norms and biases) or all (as DeepSpeed)")]
    public DecayScope WeightDecayScope { get; init; }

    [Key("Optimisation", "decay of AdamW's first moment", Below = 1)]
    public double AdamBeta1 { get; init; } = 0.9;

    [Key("Optimisation", "decay of AdamW's second moment", Below = 1)]
    public double AdamBeta2 { get; init; } = 0.999;

    [Key("Optimisation", "added to AdamW's denominator", Max = 1)]
    public double AdamEpsilon { get; init; } = 1e-8;

    [Key("Optimisation", "gradients are scaled down to this global norm; 0 is off", Max = 1e30)]
    public double MaxGradNorm { get; init; } = 1;

    [Key("Optimisation", "noise on embedded tokens in training (NEFTune): uniform, up to this / "
        + "sqrt(tokens of the row * hidden size)", Max = 1e6)]
    public double? NeftuneNoiseAlpha { get; init; }

    [Key("Optimisation", "seed of adapters, dropout, noise and order", Max = uint.MaxValue)]
    public long Seed { get; init; } = 42;

    [Key("Optimisation", "seed of the order of the rows; seed when not given", Max = uint.MaxValue)]
    public long? DataSeed { get; init; }

    [Key("Optimisation", "steps with NaN or Inf are skipped; this many in a row stop the run",
        Min = 1, SameBits = true)]
    public int MaxNonfiniteSteps { get; init; } = 5;

    [Key("Evaluation", "no, steps or epoch")]
    public When EvalStrategy { get; init; }

    [Key("Evaluation", "steps between evaluations; logging_steps when not given", Open = true)]
    public Interval? EvalSteps { get; init; }

    [Key("Evaluation", "evaluate before the first step")]
    public bool EvalOnStart { get; init; }

    /// <summary>Whether there is any evaluation.</summary>
    public bool Evaluates => EvalStrategy != When.No || EvalOnStart;

    [Key("Evaluation", "rows whose answers are generated at each evaluation, the first ones")]
    public int EvalGenerate { get; init; }

    [Key("Evaluation", "metrics of generated answers: exact_match, contains, token_accuracy, anls, "
        + "relaxed_accuracy, vqa_score, rouge_l, bleu, cider")]
    public IReadOnlyList<string> Metrics { get; init; } = ["exact_match", "contains"];

    [Key("Generation", "draw tokens from their probabilities; in chat true without num_beams")]
    public bool? DoSample { get; init; }

    [Key("Generation", "scores are divided by it before drawing; in chat 0.7", Open = true,
        Max = 1e6)]
    public double? Temperature { get; init; }

    [Key("Generation", "draw from the most likely tokens of this probability together; in chat 0.8",
        Max = 1)]
    public double? TopP { get; init; }

    [Key("Generation", "draw from so many most likely tokens, 0 from all; in chat 100")]
    public int? TopK { get; init; }

    [Key("Generation", "scores of tokens that the answer has are divided by it; in chat the "
        + "model's, 1.05, and 1.2 with beams", Open = true, Max = 1e6)]
    public double? RepetitionPenalty { get; init; }

    [Key("Generation", "search over so many beams, without drawing", Min = 1, Max = 64)]
    public int NumBeams { get; init; } = 1;

    [Key("Generation", "a beam's score is divided by its length to this power", Min = -100,
        Max = 100)]
    public double LengthPenalty { get; init; } = 1;

    [Key("Generation", "end a search with num_beams ended beams")]
    public bool EarlyStopping { get; init; }

    [Key("Generation", "most tokens of an answer; 512 when not given, in chat the model's number",
        Min = 1, Max = 1 << 20)]
    public int? MaxNewTokens { get; init; }

    [Key("Generation", "tokens before an answer may end", Max = 1 << 20)]
    public int MinNewTokens { get; init; }

    [Key("Output", "folder of checkpoints, logs and the result", Path = true)]
    public string OutputDir { get; init; } = "trainer_output";

    [Key("Output", "start anew in a used output_dir: its checkpoints are removed")]
    public bool OverwriteOutputDir { get; init; }

    [Key("Output", "no, steps or epoch")]
    public When SaveStrategy { get; init; } = When.Steps;

    [Key("Output", "steps between checkpoints", Open = true)]
    public Interval SaveSteps { get; init; } = new(500);

    [Key("Output", "newest checkpoints to keep; all when not given", Min = 1)]
    public int? SaveTotalLimit { get; init; }

    [Key("Output", "end with the best of the checkpoints that were evaluated, which is kept")]
    public bool LoadBestModelAtEnd { get; init; }

    [Key("Output", "what the best checkpoint is best by: eval_loss, eval_token_accuracy, "
        + "eval_answer_accuracy, or eval_generated_ and a metric")]
    public string? MetricForBestModel { get; init; }

    [Key("Output", "whether more of it is better; true but for eval_loss")]
    public bool? GreaterIsBetter { get; init; }

    [Key("Output", "checkpoints without optimizer state (a run cannot be resumed from them)")]
    public bool SaveOnlyModel { get; init; }

    [Key("Output", "checkpoint folder, or true for the newest one in output_dir", Path = true)]
    public ResumePoint? ResumeFromCheckpoint { get; init; }

    [Key("Output", "settings that a resumed run may have otherwise than the checkpoint's run, "
        + "which "
        + "ends \"bit for bit\": list of keys; model_name_or_path and data_path allow other ones")]
    public IReadOnlyList<string>? AllowChanges { get; init; }

    [Key("Output", "no, steps or epoch")]
    public When LoggingStrategy { get; init; } = When.Steps;

    [Key("Output", "steps between log entries", Open = true)]
    public Interval LoggingSteps { get; init; } = new(500);

    [Key("Output", "log the first step too")]
    public bool LoggingFirstStep { get; init; }

    [Key("Output", "folder of the TensorBoard files; output_dir/runs when not given", Path = true)]
    public string? LoggingDir { get; init; }

    [Key("Output", "tensorboard or none: whether TensorBoard files are written")]
    public ReportTo ReportTo { get; init; }

    [Key("Output", "name of the run in the logs")]
    public string? RunName { get; init; }

    [Key("Output", "plain lines instead of a progress bar; by itself when not in a terminal")]
    public bool? DisableTqdm { get; init; }
}
