"""What the profiler is told: options of the model, and a token that nobody sees."""

import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor

from sparsemm_vllm.budget.profile import ProfileError
from sparsemm_vllm.engine.frontend import auto_profile
from sparsemm_vllm.engine.frontend.auto_profile import profile_command
from sparsemm_vllm.profiler.engine import check_model
from support.profiler_program import FAIL, Program, build, engine_args


def test_the_program_gets_the_models_options(llava: Path, program: Program) -> None:
    build(llava, hf_overrides={"architectures": ["LlavaForConditionalGeneration"]})
    (arguments,) = program.runs
    assert arguments.startswith(f"profile {llava} --out ")
    for part in ("--data ocr", "--mode forced", "--dtype float32", "--max-model-len 512"):
        assert part in arguments
    assert '--hf-overrides {"architectures": ["LlavaForConditionalGeneration"]}' in arguments
    assert "--max-num-seqs" not in arguments, "an option of serving"


@pytest.mark.parametrize(
    ("size", "pictures"), [(112, "ocr"), (224, "ocr"), (336, "ocr-448"), (None, "ocr-448")]
)
def test_pictures_suit_what_the_model_sees(size: int | None, pictures: str) -> None:
    config = SimpleNamespace(image_size=size) if size else SimpleNamespace()
    assert auto_profile.pictures_for(config) == pictures


# Of vLLM 0.32 and 0.33.
OPTIONS_OF_SERVING = """
_api_process_count _api_process_rank additional_config aggregate_engine_logging all2all_backend
allowed_local_media_path allowed_media_domains async_scheduling attention_backend attention_config
aux_output_config block_size collect_detailed_traces compilation_config convert
cp_kv_cache_interleave_size cudagraph_capture_sizes cudagraph_metrics custom_histogram_buckets
data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port data_parallel_size
data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold
dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
decode_context_parallel_size default_mm_loras diffusion_config disable_cascade_attn
disable_chunked_mm_input disable_hybrid_kv_cache_manager disable_log_stats
disable_nccl_for_dp_synchronization dp_sync_interval ec_manager_config ec_transfer_config
elastic_ep_max_dp_size enable_batch_sharded_sampling enable_chunked_prefill enable_cumem_allocator
enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb enable_fault_tolerance
enable_flashinfer_autotune enable_hc_sp enable_layerwise_nvtx_tracing
enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding
enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format
enable_mm_embeds enable_mm_processor_stats enable_moe_shared_loras enable_nccl_comm_suspend
enable_prefix_caching enable_prompt_embeds enable_return_routed_experts enable_shm_tensor_arena
enable_sleep_mode enable_tower_connector_lora enable_trace_replay enforce_eager engram_config
eplb_config expert_placement_strategy fail_on_environ_validation fault_tolerance_config
fully_sharded_loras gdn_prefill_backend generation_config interleave_mm_strings io_processor_plugin
ir_op_priority jit_monitor_mode jit_monitor_verbose kda_decode_backend kda_prefill_backend
kernel_config kv_cache_dtype kv_cache_dtype_skip_layers kv_cache_metrics kv_cache_metrics_sample
kv_events_config kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill
kv_transfer_config language_model_only limit_mm_per_prompt log_config_file log_level logging_config
logits_processors logprobs_mode long_prefill_token_threshold long_prefill_token_threshold_adaptive
lora_dtype lora_target_modules mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode
mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm master_addr
master_port max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_cls_labels max_lora_rank
max_loras max_num_active_seqs max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens
max_num_scheduled_tokens max_num_seqs max_parallel_loading_workers media_io_kwargs
mm_device_do_normalize mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path
mm_encoder_only mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
mm_processor_cache_type mm_processor_device mm_shm_cache_max_object_size_mb mm_tensor_ipc
model_weights monokernel nnodes node_rank num_gpu_blocks_override numa_bind numa_bind_cpus
numa_bind_nodes optimization_level otlp_traces_endpoint override_generation_config
per_request_spec_decode_metrics performance_mode pooler_config prefill_context_parallel_size
prefill_schedule_interval prefix_cache_retention_interval prefix_caching_hash_algo
prefix_match_unit profiler_config quantization_config ray_workers_use_nsight reasoning_config
reasoning_parser reasoning_parser_plugin renderer_num_workers replayssm_buffer_len
return_sampling_mask runner scheduler_cls scheduler_reserve_full_isl scheduling_policy seed
served_model_name show_hidden_metrics_for_version shutdown_timeout skip_tokenizer_init
sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names
sparse_indexer_topk_backend spec_method spec_model spec_tokens specialize_active_lora
speculative_config stream_interval structured_outputs_config swa_bounded_replay tokens_only
ubatch_size use_fp64_gumbel use_replayssm use_tqdm_on_load video_pruning_method video_pruning_rate
watchdog_config watermark watermark_config weight_transfer_config worker_cls worker_extension_cls
"""
# A value of each option that is none's default.
OPTIONS: dict[str, Any] = {
    "allow_deprecated_quantization": True,
    "code_revision": "v1",
    "config_format": "hf",
    "cpu_distributed_timeout_seconds": 7,
    "cpu_offload_gb": 1.5,
    "cpu_offload_params": {"experts", "mlp.up"},
    "device_ids": [1, 0],
    "disable_custom_all_reduce": True,
    "disable_sliding_window": True,
    "distributed_executor_backend": "mp",
    "distributed_timeout_seconds": 8,
    "download_dir": "/somewhere else",
    "dtype": "float32",
    "enable_expert_parallel": True,
    "gpu_memory_utilization": 0.5,
    "hf_config_path": "/configs",
    "hf_overrides": {"a": {"b": "c d"}},
    "ignore_patterns": ["original/*", "*.pth"],
    "kv_cache_memory_bytes": 1 << 20,
    "linear_backend": "triton",
    "load_format": "safetensors",
    "max_model_len": 512,
    "mm_encoder_attn_backend": "TORCH_SDPA",
    "mm_encoder_attn_dtype": "fp8",
    "mm_encoder_fp8_scale_path": "/scales.json",
    "mm_encoder_tp_mode": "data",
    "mm_processor_kwargs": {"max_pixels": 1000},
    "model_class_overrides": {"A": "module:B"},
    "model_impl": "vllm",
    "model_loader_extra_config": {"concurrency": 16, "distributed": True},
    "moe_backend": "triton",
    "offload_backend": "prefetch",
    "offload_group_size": 2,
    "offload_num_in_group": 2,
    "offload_params": {"w1"},
    "offload_prefetch_step": 2,
    "pipeline_parallel_size": 2,
    "pt_load_map_location": {"cuda": "cpu"},
    "quantization": "fp8",
    "revision": "main",
    "safetensors_load_strategy": "eager",
    "safetensors_prefetch_block_size": 1 << 10,
    "safetensors_prefetch_num_threads": 3,
    "skip_mm_profiling": True,
    "tensor_parallel_size": 2,
    "tokenizer_mode": "slow",
    "tokenizer_revision": "main",
    "trust_remote_code": True,
}


def read_back(given: Any) -> Any:
    """The options that vLLM reads from the profiler's command line."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = profile_command(given, Path("out.json"), "ocr")
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    start = command.index("--samples") + 2
    return EngineArgs.from_cli_args(
        parser.parse_args(["--model", str(given.model), *command[start:]])
    )


def test_vllm_reads_the_options_back(llava: Path) -> None:
    options = OPTIONS | {"tokenizer": str(llava)}
    assert options.keys() == set(auto_profile.MODEL_OPTIONS)
    given = engine_args(llava, **options)
    read, default = read_back(given), type(given)(model=str(llava))
    for name in auto_profile.MODEL_OPTIONS:
        ours, theirs = getattr(given, name), getattr(read, name)
        assert type(ours)(theirs) == ours if isinstance(ours, set) else theirs == ours, name
        assert ours != getattr(default, name), f"{name}: this shows nothing"


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_patterns": "*.pth"},
        {"pt_load_map_location": "cuda:1"},
        {"quantization": "fp8_per_tensor"},
        {"hf_token": True},
    ],
    ids=str,
)
def test_other_kinds_of_values(llava: Path, options: dict[str, Any]) -> None:
    given = engine_args(llava, **options)
    read = read_back(given)
    for name in options:
        ours, theirs = getattr(given, name), getattr(read, name)
        assert theirs in (ours, [ours]), "one pattern and a list of it are the same"


def test_every_option_of_vllm_was_looked_at() -> None:
    """One that a new vLLM brings may say which model is loaded, how or where."""
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in fields(EngineArgs)}
    passed_on = {*auto_profile.MODEL_OPTIONS, "model", "hf_token"}
    serving = set(OPTIONS_OF_SERVING.split())
    assert not passed_on & serving
    assert passed_on <= names
    assert names <= passed_on | serving, "pass it on, or list it as one of serving"


SECRET = "hf_" + "s" * 34


@pytest.mark.parametrize("token", [SECRET, True, False, None])
def test_a_token_is_on_no_command_line_and_in_no_log(
    llava: Path, program: Program, said: list[str], token: str | bool | None, monkeypatch: Any
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    program.write(fail=FAIL)
    with pytest.raises(ProfileError) as error:
        build(llava, hf_token=token)
    (arguments,) = program.runs
    assert ("--hf-token" in arguments) == bool(token)
    assert arguments.endswith("--hf-token") == bool(token)
    assert program.environment.get("HF_TOKEN") == (token if token == SECRET else None)
    assert ("HF_HUB_DISABLE_IMPLICIT_TOKEN" in program.environment) == (token is False)
    assert SECRET not in " ".join([arguments, str(error.value), *said])
    assert "HF_TOKEN" not in os.environ


def test_the_profiler_reads_the_model_with_the_token(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    for reader in (AutoConfig, AutoProcessor):
        original = reader.from_pretrained

        def read(model: str, original: Any = original, **options: Any) -> Any:
            given.append(options)
            return original(model)

        monkeypatch.setattr(reader, "from_pretrained", read)
    check_model(str(llava), {"hf_token": True, "revision": "main", "dtype": "float32"})
    ours = given[:2]  # the processor may read the config once more
    assert ours == [{"revision": "main", "token": True}] * 2
