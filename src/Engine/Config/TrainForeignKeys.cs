namespace MiniCpmNative.Engine.Config;

/// <summary>
/// Keys of the official scripts and of Hugging Face that mean nothing here. Those that cannot
/// change the result are accepted, so that an existing command line moves over unchanged; the
/// others are accepted at their neutral value only, and refused by name otherwise.
/// </summary>
internal static class TrainForeignKeys
{
    /// <summary>Accepted whatever the value.</summary>
    public static IReadOnlySet<string> Ignored { get; } = new HashSet<string>(
        """
        add_version average_tokens_across_devices batch_eval_metrics bf16_full_eval cache_dir create_checkpoint_symlink
        data_parallel dataset_num_proc download_mode lazy_tokenize load_from_cache_file
        overwrite_cache plot_loss preprocessing_num_workers print_param_status trust_remote_code use_hf
        dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
        ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout
        debug do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps
        eval_do_concat_batches eval_use_gather_object fp16_backend fp16_full_eval fp16_opt_level
        fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap full_determinism
        gradient_checkpointing_kwargs half_precision_backend hub_always_push hub_model_id
        hub_private_repo hub_revision hub_strategy hub_token include_for_metrics
        include_inputs_for_metrics include_num_input_tokens_seen include_tokens_per_second
        jit_mode_eval label_names length_column_name liger_kernel_config local_rank log_level
        log_level_replica log_on_each_node logging_nan_inf_filter mp_parameters
        prediction_loss_only project push_to_hub_model_id push_to_hub_organization
        push_to_hub_token ray_scope remove_unused_columns restore_callback_states_from_checkpoint
        save_on_each_node skip_memory_metrics torch_compile torch_compile_backend
        torch_compile_mode torch_empty_cache_steps torchdynamo tpu_metrics_debug tpu_num_cores
        trackio_space_id use_ipex use_legacy_prediction_loop use_liger_kernel
        """.Split((char[])[' ', '\n', '\r'], StringSplitOptions.RemoveEmptyEntries));

    /// <summary>
    /// Neutral values beside none, null, false and the empty text; what to do otherwise.
    /// </summary>
    public static IReadOnlyDictionary<string, (string[] Neutral, string Advice)> Refused { get; } =
        new Dictionary<string, (string[], string)>
        {
            ["accelerator_config"] = ([], "is not supported"),
            ["adafactor"] = ([], "is spelt optim=adafactor here"),
            ["auto_find_batch_size"] = ([], "is not supported: set per_device_train_batch_size"),
            ["eval_delay"] = (["0"], "is not supported: set eval_steps"),
            ["group_by_length"] =
                ([], "is not supported: train_sampling_strategy is random or sequential"),
            ["ignore_data_skip"] = ([], "is not supported: a resumed run goes on at its row"),
            ["label_smoothing_factor"] = (["0"], "is not supported"),
            ["no_cuda"] = ([], "is spelt device=cpu here"),
            ["optim_args"] = ([], "is not supported: adam_beta1, adam_beta2 (of lion too) and "
                + "adam_epsilon are keys"),
            ["optim_target_modules"] = ([], "is not supported"),
            ["parallelism_config"] = ([], "is not supported"),
            ["past_index"] = (["-1"], "is not supported"),
            ["push_to_hub"] = ([], "is not supported: nothing is uploaded"),
            ["load_in_8bit"] = ([], "is not supported: q_lora quantises to 4 bits"),
            ["save_safetensors"] =
                (["true"], "is not supported: everything is saved as safetensors"),
            ["use_cpu"] = ([], "is spelt device=cpu here"),
            ["use_mps_device"] = ([], "is not supported: device is auto, cpu or cuda"),
        };

    public static bool IsNeutral(string key, string value) =>
        value is "" or "none" or "null" or "false"
        || Refused[key].Neutral.Contains(value == "0.0" ? "0" : value);
}
