using System.Text.Json;

namespace MiniCpmNative.Engine.Config;

/// <summary>
/// A configuration of DeepSpeed's (the key deepspeed): what of it means something on one GPU
/// becomes keys of the run, unless the run says otherwise itself; what cannot change the result is
/// accepted; all else is refused by name. "auto" is what the run's own keys say, as with
/// transformers.
/// </summary>
internal static class DeepSpeedFile
{
    private static readonly string[] s_official = ["ds_config_zero2.json", "ds_config_zero3.json"];

    // Values that are taken over, by path.
    private static readonly Dictionary<string, string> s_taken = new()
    {
        ["gradient_accumulation_steps"] = "gradient_accumulation_steps",
        ["train_micro_batch_size_per_gpu"] = "per_device_train_batch_size",
        ["gradient_clipping"] = "max_grad_norm",
        ["fp16.enabled"] = "fp16",
        ["bf16.enabled"] = "bf16",
        ["bfloat16.enabled"] = "bf16",
        ["optimizer.params.lr"] = "learning_rate",
        ["optimizer.params.eps"] = "adam_epsilon",
        ["optimizer.params.weight_decay"] = "weight_decay",
        ["scheduler.params.warmup_max_lr"] = "learning_rate",
        ["scheduler.params.warmup_num_steps"] = "warmup_steps",
        ["zero_optimization.cpu_offload"] = "offload_optimizer",
        ["zero_optimization.cpu_offload_params"] = "offload_param",
        ["zero_optimization.cpu_offload_param"] = "offload_param",
    };

    // How work is cut up, sent between GPUs, printed and saved; 16-bit gradients' scale, which F32
    // ones need not have.
    private static readonly HashSet<string> s_noEffect =
    [
        .. """
        steps_per_print wall_clock_breakdown dump_state memory_breakdown dataloader_drop_last
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients
        gradient_predivide_factor sparse_gradients disable_allgather communication_data_type
        seq_parallel_communication_data_type graph_harvesting checkpoint_tag_validation
        fp16.auto_cast fp16.loss_scale fp16.loss_scale_window fp16.initial_scale_power
        fp16.hysteresis fp16.min_loss_scale fp16.consecutive_hysteresis
        fp16.fp16_master_weights_and_grads bf16.immediate_grad_update bf16.check_grad_overflow
        optimizer.params.torch_adam optimizer.params.fp32_optimizer_states
        checkpoint.tag_validation checkpoint.load_universal checkpoint.use_node_local_storage
        activation_checkpointing.partition_activations activation_checkpointing.profile
        activation_checkpointing.contiguous_memory_optimization
        activation_checkpointing.number_checkpoints
        activation_checkpointing.synchronize_checkpoint_boundary
        aio.block_size aio.queue_depth aio.thread_count aio.single_submit aio.overlap_events
        """.Split((char[])[' ', '\n', '\r'], StringSplitOptions.RemoveEmptyEntries),
        .. """
        stage allgather_partitions allgather_bucket_size overlap_comm reduce_scatter
        reduce_bucket_size contiguous_gradients round_robin_gradients sub_group_size
        load_from_fp32_weights elastic_checkpoint legacy_stage1 ignore_unused_parameters
        cpu_offload_use_pin_memory stage3_prefetch_bucket_size stage3_param_persistence_threshold
        stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
        stage3_use_all_reduce_for_fetch_params stage3_module_granularity_threshold
        stage3_allgather_sequential stage3_reduce_seq gather_16bit_weights_on_model_save
        prefetch_bucket_size param_persistence_threshold model_persistence_threshold
        max_live_parameters max_reuse_distance use_all_reduce_for_fetch_params
        module_granularity_threshold allgather_sequential memory_efficient_linear
        use_multi_rank_bucket_allreduce pipeline_loading_checkpoint override_module_apply
        log_trace_cache_warnings zero_hpz_partition_size mics_shard_size
        mics_hierarchical_params_gather grad_partitioned
        """.Split((char[])[' ', '\n', '\r'], StringSplitOptions.RemoveEmptyEntries)
            .Select(name => "zero_optimization." + name),
        .. ((string[])["offload_optimizer", "offload_param"]).SelectMany(key =>
            ((string[])["nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory",
                "pipeline", "pipeline_read", "pipeline_write", "fast_init"])
            .Select(name => $"zero_optimization.{key}.{name}")),
    ];

    // Off, or one value, is what there is; what to do otherwise.
    private static readonly Dictionary<string, (string Neutral, string Advice)> s_refused = new()
    {
        ["amp.enabled"] = ("false", "apex is not supported: set bf16 or fp16"),
        ["torch_autocast.enabled"] = ("false", "is not supported: set bf16"),
        ["optimizer.params.adam_w_mode"] =
            ("true", "L2 decay inside Adam is not supported: decay is decoupled"),
        ["optimizer.params.bias_correction"] = ("true", "moments are always corrected"),
        ["optimizer.params.amsgrad"] = ("false", "is not supported"),
        ["zero_optimization.offload_optimizer.ratio"] =
            ("1", "a part is not supported: all of it, or none"),
        ["zero_optimization.offload_param.ratio"] =
            ("1", "a part is not supported: all of it, or none"),
        ["zero_optimization.zero_quantized_weights"] = ("false", "is not supported: q_lora "
            + "holds frozen weights in 4 bits"),
        ["zero_optimization.zero_quantized_nontrainable_weights"] =
            ("false", "is not supported: q_lora holds frozen weights in 4 bits"),
        ["zero_optimization.zero_quantized_gradients"] =
            ("false", "is not supported: gradients are float32"),
        ["activation_checkpointing.cpu_checkpointing"] =
            ("false", "is not supported: inputs of layers stay on the GPU"),
        ["data_types.grad_accum_dtype"] = ("fp32", "gradients are added up in float32"),
        ["flops_profiler.enabled"] = ("false", "is not supported: cpmx plan counts a step's work"),
        ["comms_logger.enabled"] = ("false", "is not supported"),
        ["tensorboard.enabled"] = ("false", "is spelt report_to=tensorboard here"),
        ["wandb.enabled"] = ("false", "is not supported: report_to is tensorboard or none"),
        ["csv_monitor.enabled"] = ("false", "is not supported: train.log.jsonl has the numbers"),
        ["comet.enabled"] = ("false", "is not supported: report_to is tensorboard or none"),
        ["elasticity.enabled"] = ("false", "is not supported"),
        ["autotuning.enabled"] = ("false", "is not supported: cpmx plan says what fits"),
        ["progressive_layer_drop.enabled"] = ("false", "is not supported"),
        ["eigenvalue.enabled"] = ("false", "is not supported"),
        ["curriculum_learning.enabled"] = ("false", "is not supported"),
        ["data_efficiency.enabled"] = ("false", "is not supported"),
        ["hybrid_engine.enabled"] = ("false", "is not supported"),
        ["compile.enabled"] = ("false", "is not supported"),
    };

    /// <summary>Keys of the run that follow from a file's, or the key's own object.</summary>
    /// <param name="given">The key deepspeed.</param>
    /// <param name="take">Takes a key's name, its value, and where that stands; false where the run
    /// says it itself.</param>
    /// <param name="notice">Takes lines on what is not taken over.</param>
    /// <exception cref="InputException">Lists what is refused, and what is unknown.</exception>
    public static void Read(
        Given given, Func<string, JsonElement, string, bool> take, Action<string> notice)
    {
        JsonElement root;
        string place = "deepspeed";
        if (given.Json is { ValueKind: JsonValueKind.Object } inline) root = inline;
        else
        {
            string name = given.Plain();
            if (name.Any(char.IsControl))
                throw new InputException(
                    $"deepspeed is {Messages.Quote(name)}, which is not the name of a file");
            string path = Path.GetFullPath(name, given.Folder);
            place = Path.GetFileName(path);
            if (!File.Exists(path) && s_official.Contains(place))
            {
                notice($"deepspeed is not used: {place} is not there, so its scheduler and "
                    + "optimizer "
                    + "are not taken over (lr_scheduler_type=warmup_lr and weight_decay_scope=all "
                    + "do as they would)");
                return;
            }

            root = JsonInput.ReadObject(path).Element;
        }

        var problems = new List<string>();
        foreach (var (path, value) in Leaves("", root))
        {
            string text = value.ValueKind == JsonValueKind.String
                ? value.GetString()! : value.GetRawText();
            if (text == "auto" || s_noEffect.Contains(path)) continue;
            if (Problem(path, value, text) is { } problem)
                problems.Add($"{path} = {Messages.Quote(text)} {problem}");
        }

        if (problems.Count > 0)
            throw new InputException($"{place}: {string.Join("; ", problems.Take(20))}"
                + (problems.Count > 20 ? $"; and {problems.Count - 20} more" : ""));
        if (root.TryGetProperty("train_batch_size", out JsonElement size) && size.ValueKind
            == JsonValueKind.Number && root.TryGetProperty("train_micro_batch_size_per_gpu", out _))
            notice($"{place}: train_batch_size is not used: it follows from "
                + "per_device_train_batch_size and gradient_accumulation_steps");

        string? Problem(string path, JsonElement value, string text)
        {
            if (s_taken.TryGetValue(path, out string? key))
            {
                take(key, value, $"{place}: {path}");
                return null;
            }

            switch (path)
            {
                case "train_batch_size":
                    return null;
                case "zero_optimization.offload_optimizer.device":
                case "zero_optimization.offload_param.device":
                    if (text == "none") return null;
                    if (text != "cpu")
                        return "is not supported, expected none or cpu: the machine's memory";
                    take(path.Split('.')[1], s_true, $"{place}: {path}");
                    return null;
                case "optimizer.type":
                    if (text is not ("AdamW" or "Adam" or "FusedAdam" or "DeepSpeedCPUAdam"))
                        return "is not supported: leave optimizer out and set optim";
                    // Its optimizer gets one group of parameters.
                    if (!take("weight_decay_scope", s_all, $"{place}: {path}"))
                        notice($"{place}: DeepSpeed's optimizer would decay all parameters; "
                            + "weight_decay_scope decides");
                    return null;
                case "optimizer.params.betas":
                    if (value.ValueKind != JsonValueKind.Array || value.GetArrayLength() != 2)
                        return "expected a list of two numbers";
                    take("adam_beta1", value[0], $"{place}: {path}");
                    take("adam_beta2", value[1], $"{place}: {path}");
                    return null;
                case "scheduler.type":
                    if (text is not "WarmupLR")
                        return "is not supported: leave scheduler out and set lr_scheduler_type";
                    if (!take("lr_scheduler_type", s_warmup, $"{place}: {path}"))
                        notice($"{place}: DeepSpeed would use its scheduler WarmupLR; "
                            + "lr_scheduler_type decides");
                    return null;
                case "scheduler.params.warmup_min_lr":
                    return value.ValueKind == JsonValueKind.Number && value.GetDouble() == 0 ? null
                        : "is spelt lr_scheduler_kwargs here: {\"warmup_min_lr\": ...}";
                case "scheduler.params.warmup_type":
                    return text == "log" ? null
                        : "is spelt lr_scheduler_kwargs here: {\"warmup_type\": ...}";
            }

            if (s_refused.TryGetValue(path, out var refused))
                return text == refused.Neutral || (text == "1.0" && refused.Neutral == "1")
                    ? null : refused.Advice;
            // The rest of what is off does not matter.
            int dot = path.IndexOf('.');
            if (dot > 0 && s_refused.ContainsKey(path[..dot] + ".enabled")) return null;
            return "is unknown" + TrainKeys.Guess(path, Known());
        }
    }

    private static readonly JsonElement s_true = JsonSerializer.SerializeToElement(true),
        s_all = JsonSerializer.SerializeToElement("all"),
        s_warmup = JsonSerializer.SerializeToElement("warmup_lr");

    private static IEnumerable<string> Known() => s_noEffect.Concat(s_taken.Keys)
        .Concat(s_refused.Keys).Concat(["zero_optimization.offload_optimizer.device",
            "zero_optimization.offload_param.device", "optimizer.type", "optimizer.params.betas",
            "scheduler.type", "train_batch_size"]);

    private static IEnumerable<(string Path, JsonElement Value)> Leaves(
        string path, JsonElement value)
    {
        if (value.ValueKind != JsonValueKind.Object) return [(path, value)];
        return value.EnumerateObject().SelectMany(member =>
            Leaves(path.Length == 0 ? member.Name : $"{path}.{member.Name}", member.Value));
    }
}
