"""The attributes that SPARSEMM reads or sets of objects that vLLM makes."""

# Attributes that we read or set, of objects that vLLM makes.
ATTRIBUTES = {
    "vllm.config:VllmConfig": "additional_config attention_config cache_config compilation_config "
    "kv_transfer_config model_config parallel_config scheduler_config speculative_config "
    "use_v2_model_runner",
    "vllm.config:CacheConfig": "block_size cache_dtype enable_prefix_caching "
    "kv_cache_dtype_skip_layers kv_offloading_size num_gpu_blocks prefix_cache_retention_interval "
    "user_specified_block_size",
    "vllm.config:CompilationConfig": "custom_ops static_forward_context",
    "vllm.config:ModelConfig": "dtype enforce_eager get_head_size get_num_attention_heads "
    "get_num_kv_heads get_sliding_window get_total_num_hidden_layers get_total_num_kv_heads "
    "hf_config hf_text_config is_attention_free is_encoder_decoder is_hybrid max_model_len model "
    "model_arch_config multimodal_config rswa_window runner_type served_model_name use_mla",
    "vllm.config:MultiModalConfig": "video_pruning_rate",
    "vllm.config:ParallelConfig": "decode_context_parallel_size pipeline_parallel_size "
    "prefill_context_parallel_size tensor_parallel_size use_ubatching",
    "vllm.config:SchedulerConfig": "disable_chunked_mm_input disable_hybrid_kv_cache_manager "
    "long_prefill_token_threshold max_num_batched_tokens max_num_scheduled_tokens max_num_seqs",
    "vllm.config:SpeculativeConfig": "method num_speculative_tokens",
    "vllm.config:AttentionConfig": "backend backend_per_kind",
    "vllm.engine.arg_utils:EngineArgs": "attention_backend attention_config create_engine_config",
    "vllm.lora.request:LoRARequest": "lora_name",
    "vllm.model_executor.layers.attention.attention:Attention": "attn_backend "
    "get_attn_backend impl kv_cache layer_name",
    "vllm.multimodal.inputs:MultiModalFeatureSpec": "identifier mm_position",
    "vllm.multimodal.inputs:PlaceholderRange": "length offset",
    "vllm.v1.core.block_pool:BlockPool": "get_num_free_blocks num_gpu_blocks",
    "vllm.v1.core.encoder_cache_manager:EncoderCacheManager": "cache_size get_cached_input_ids "
    "num_free_slots num_freeable_slots",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "single_type_managers",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "coordinator",
    "vllm.v1.core.sched.output:NewRequestData": "block_ids lora_request mm_features "
    "num_computed_tokens prefill_token_ids prompt_len prompt_token_ids req_id sampling_params",
    "vllm.v1.core.sched.output:SchedulerOutput": "num_scheduled_tokens total_num_scheduled_tokens",
    "vllm.v1.core.sched.scheduler:Scheduler": "ec_connector encoder_cache_manager "
    "grammar_compile_error_reqs kv_cache_manager max_num_encoder_input_tokens "
    "max_num_scheduled_tokens pause_state policy requests running",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": "block_pool block_size "
    "req_to_blocks",
    "vllm.v1.engine:EngineCoreOutputs": "scheduler_stats",
    "vllm.v1.engine.async_llm:AsyncLLM": "logger_manager",
    "vllm.v1.kv_cache_interface:FullAttentionSpec": "head_size head_size_v num_kv_heads",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups num_blocks",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry": "_ensure_registered",
    "vllm.v1.metrics.loggers:StatLoggerManager": "engine_indexes stat_loggers",
    "vllm.v1.metrics.stats:SchedulerStats": "ec_connector_stats",
    "vllm.v1.request:Request": "arrival_time has_encoder_inputs mm_features num_computed_tokens "
    "num_in_flight_tokens num_preemptions num_prompt_tokens num_tokens priority request_id "
    "resumable sampling_params status",
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": "model_runner_output",
    "vllm.v1.worker.gpu.block_table:BlockTables": "input_block_tables num_blocks",
    "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor": "np",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "idx_mapping idx_mapping_np num_reqs "
    "num_reqs_after_padding num_scheduled_tokens positions prefill_len_np query_start_loc "
    "query_start_loc_np seq_lens seq_lens_cpu_upper_bound",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "model_state",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState": "device dtype max_model_len "
    "max_num_reqs max_num_tokens vllm_config",
}
