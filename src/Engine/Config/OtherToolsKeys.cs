namespace MiniCpmNative.Engine.Config;

/// <summary>
/// Keys of LLaMA-Factory's and ms-swift's recipes that are none here, and what to write instead.
/// </summary>
internal static class OtherToolsKeys
{
    // Key, then what is set here, or, behind a colon, what there is to say.
    private const string Table = """
        acc_strategy : eval_token_accuracy and eval_answer_accuracy are both logged
        adapter_name_or_path lora_weight_path
        adapters lora_weight_path
        add_non_thinking_prefix : think blocks are as the model's own template has them
        additional_args : write the keys themselves
        additional_target modules_to_save
        agent_template : calls of functions are not trained here
        aligner_lr learning_rates, as {"joiner": 1e-5}
        apollo_target : of optimizers of low memory there are adamw_8bit, paged_adamw_8bit, lion_8bit and adafactor
        attn_impl : attention is chosen by the device
        badam_mode : of optimizers of low memory there are adamw_8bit, paged_adamw_8bit, lion_8bit and adafactor
        batch_size per_device_train_batch_size
        beta : preference training is not supported
        buffer_size : rows are read before the first step
        check_dataset_strategy : cpmx data check looks at the rows
        check_model_is_latest : leave it out, nothing is downloaded
        ckpt_dir lora_weight_path
        columns : name the columns in a dataset_info.json beside the file
        compute_accuracy : accuracies are logged with every evaluation
        create_new_adapter : merge the adapter with cpmx merge first, then train a new one
        custom_register_path : there are no plugins
        custom_train_dataset_path data_path
        custom_val_dataset_path eval_data_path
        cutoff_len model_max_length
        dataset data_path, with the file or dataset_info.json#NAME, several as a list
        dataset_dir data_path, with the whole path
        dataset_shuffle train_sampling_strategy (random or sequential)
        dataset_test_ratio eval_split
        deepspeed_config_path : leave it out, its scheduler and optimizer are lr_scheduler_type and optim here
        default_system : write it as "system" into the rows
        device_map device
        disable_auto_column_mapping : name the columns in a dataset_info.json beside the file
        disable_gradient_checkpointing recompute=nothing
        disable_shuffling train_sampling_strategy=sequential
        do_train_from_scratch : a model's weights are needed to start from
        double_quantization bnb_4bit_use_double_quant
        dtype bf16 or fp16
        early_stopping_steps : the run does all its steps; choose among its checkpoints
        enable_channel_loss : the loss is that of all rows
        enable_dft_loss : the loss is cross-entropy
        enable_liger_kernel : leave it out, the kernels are this program's own
        enable_thinking : think blocks are as the model's own template has them
        eval_batch_size per_device_eval_batch_size
        eval_dataset eval_data_path
        eval_limit : make a smaller file, or set eval_split to a number of rows
        eval_on_each_dataset : evaluation rows are taken together
        eval_step eval_steps
        export_device : cpmx merge writes the merged model
        export_dir : cpmx merge writes the merged model
        export_legacy_format : everything is saved as safetensors
        export_quantization_bit : cpmx export gguf writes quantised models
        export_quantization_dataset : cpmx export gguf writes quantised models
        export_size : cpmx merge writes the merged model
        external_plugins : there are no plugins
        finetuning_type use_lora (true for lora, false for full)
        flash_attn : attention is chosen by the device
        freeze_aligner : the resampler is trained in full fine-tuning; beside adapters by modules_to_save=resampler
        freeze_language_model tune_llm, which is its opposite
        freeze_llm tune_llm, which is its opposite
        freeze_multi_modal_projector : the resampler is trained in full fine-tuning; beside adapters by modules_to_save=resampler
        freeze_parameters tune_vision and tune_llm
        freeze_parameters_ratio tune_vision and tune_llm
        freeze_vision_tower tune_vision, which is its opposite
        freeze_vit tune_vision, which is its opposite
        galore_rank : gradients of low rank are LoRA's (use_lora)
        ignore_args_error : every key is read or named
        ignore_pad_token_for_loss : leave it out, a batch has no padding
        image_max_pixels max_slice_nums
        image_min_pixels : pictures are as large as the model takes them
        infer_backend : cpmx chat, eval and predict answer
        init_weights init_lora_weights
        interleave_prob : files are taken one behind the other
        interleave_probs : files are taken one behind the other
        is_binary_loss_scale : a turn's "loss" is true or false
        load_args : a configuration is one file
        load_data_args : a configuration is one file
        load_dataset_config : a configuration is one file
        local_repo_path : no code of the model is needed
        lora_bias_trainable lora_bias
        lora_dropout_p lora_dropout
        lora_dtype : adapters are float32 in training
        lora_lr_ratio loraplus_lr_ratio
        lora_modules_to_save modules_to_save
        lora_rank lora_r
        lora_target lora_target_modules, with a list of names, a regular expression, or all-linear
        lora_target_regex lora_target_modules
        loss_scale train_on (all or last)
        loss_type : the loss is cross-entropy
        mask_history train_on=last
        max_length model_max_length
        max_pixels max_slice_nums
        max_samples : make a smaller file (head -n of a .jsonl)
        media_dir : pictures are looked for beside the data file, then in the working directory
        merge_lora : cpmx merge writes the merged model
        min_pixels : pictures are as large as the model takes them
        mix_strategy : files are taken one behind the other
        model model_name_or_path
        model_author : leave it out
        model_id_or_path model_name_or_path
        model_kwargs max_slice_nums
        model_name : leave it out
        model_revision : the model is a folder; download the revision that is wanted
        model_type : leave it out, the model's files say it
        neat_packing : rows are not packed
        new_special_tokens : the vocabulary is the model's own
        norm_bbox box_format
        num_proc dataloader_num_workers
        optimizer optim
        packing : rows are not packed; a batch has no padding between them
        padding_free : leave it out, a batch has no padding
        padding_side : leave it out, a batch has no padding
        predict_with_generate eval_generate, with a number of rows
        pref_beta : preference training is not supported
        pref_loss : preference training is not supported
        preprocess_num_proc dataloader_num_workers
        preprocessing_batch_size : leave it out, rows are read before the first step
        preserve_thinking : think blocks are as the model's own template has them
        pure_bf16 bf16 and optim=adamw_bf16
        quant_bits q_lora, for 4 bits
        quant_method q_lora, which quantises to 4 bits on load
        quantization_bit q_lora, for 4 bits
        quantization_method q_lora, which quantises to 4 bits on load
        quantization_type bnb_4bit_quant_type
        ray_run_name : one machine trains
        resize_vocab : the vocabulary is the model's own
        response_prefix : answers begin as the model's own template has them
        resume_only_model lora_weight_path, with the checkpoint's folder
        rlhf_type : preference training is not supported
        rope_scaling : positions are as the model's config.json has them
        rpo_alpha : preference training is not supported
        save_hf_model : whole models are saved in the layout of the model
        self_cognition_sample : name the files that are wanted in data_path
        sequence_parallel_size : one device trains
        sft_type use_lora (true for lora, false for full)
        shift_attn : attention is the model's own
        show_dataset_sample : cpmx data check shows a row
        shuffle_buffer_size : all rows are shuffled
        split_dataset_ratio eval_split
        stage : supervised fine-tuning (sft) is what cpmx train does; leave it out
        streaming : rows are read before the first step
        strict on_bad_row (error or skip)
        swanlab_project : logs are train_log.jsonl, TensorBoard's files and report.html
        swift_version : leave it out
        system : write it as "system" into the rows
        target_modules lora_target_modules
        target_regex lora_target_modules
        template : leave it out, the chat format is the model's own
        template_backend : leave it out, the chat format is the model's own
        tokenized_path : rows are read from data_path
        tool_format : calls of functions are not trained here
        torch_dtype bf16 or fp16
        train_dataset_sample : make a smaller file (head -n of a .jsonl)
        train_on_prompt : questions are not learned
        train_type use_lora (true for lora, false for full)
        trainable_parameters modules_to_save
        truncation_strategy : longer rows are cut at their end, and counted before the first step
        tuner_type use_lora (true for lora, false for full)
        use_adam_mini optim=adamw_8bit, whose moments take the fewest bits
        use_apollo : of optimizers of low memory there are adamw_8bit, paged_adamw_8bit, lion_8bit and adafactor
        use_badam : of optimizers of low memory there are adamw_8bit, paged_adamw_8bit, lion_8bit and adafactor
        use_chat_template : the chat format is the model's own
        use_flash_attn : attention is chosen by the device
        use_galore : gradients of low rank are LoRA's (use_lora)
        use_loss_scale train_on (all or last)
        use_muon : optim has adamw, lion, adafactor and sgd
        use_reentrant_gc gradient_checkpointing
        use_swanlab : logs are train_log.jsonl, TensorBoard's files and report.html
        use_unsloth : leave it out, the kernels are this program's own
        use_unsloth_gc gradient_checkpointing
        val_dataset eval_data_path
        val_dataset_sample : make a smaller file, or set eval_split to a number of rows
        val_size eval_split
        video_max_pixels : frames are resized as the model's processor does
        video_maxlen video_max_frames
        vit_gradient_checkpointing gradient_checkpointing
        vit_lr learning_rates, as {"vision": 1e-5}
        wandb_project : logs are train_log.jsonl, TensorBoard's files and report.html
        """;

    private static readonly Dictionary<string, string> s_advice = Table
        .Split((char[])['\n', '\r'], StringSplitOptions.RemoveEmptyEntries)
        .Select(line => line.Split(' ', 2))
        .ToDictionary(parts => parts[0], parts =>
            parts[1].StartsWith(": ", StringComparison.Ordinal)
            ? $"is not used here: {parts[1][2..]}" : $"is not used here: set {parts[1]}");

    /// <summary>What to do about another tool's key; null for a key of none.</summary>
    public static string? Advice(string key) => s_advice.GetValueOrDefault(key);
}
