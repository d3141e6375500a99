"""`sparsemm check`: whether an installed vLLM still has everything that SPARSEMM attaches to.

Of a release that SPARSEMM was not written for, it makes a list of what moved instead of a
traceback. Nothing of vLLM is changed, and no module of ours that needs vLLM is imported.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsemm_vllm import patches
from sparsemm_vllm.patches import RELIED_ON, WRAPPED, WRAPPED_IN_WORKERS, Symbol

# Methods that our classes put in place of vLLM's, each with all of its parameters: vLLM would pass
# a new one to our method too. A test holds this against the classes.
OVERRIDDEN = {
    "vllm.platforms.cpu:CpuPlatform": """
        import_kernels() get_attn_backend_cls(selected_backend attn_selector_config num_heads)
        check_and_update_config(vllm_config)
    """,
    "vllm.v1.attention.backend:AttentionBackend": """
        supports_kv_connector() get_name() supports_sliding_window()
        get_supported_kernel_block_sizes(kv_cache_spec) get_impl_cls() get_builder_cls()
        supports_head_size(head_size) supports_attn_type(attn_type) supports_mm_prefix()
        supports_non_causal() supports_sink() supports_rswa() supports_batch_invariance()
        supports_alibi_sqrt() supports_per_head_quant_scales() supports_dcp() supports_pcp()
        supports_non_causal_dcp() supports_device_cpu_query_lens_mismatch()
        supported_kv_cache_layouts()
    """,
    "vllm.v1.attention.backend:AttentionImpl": """
        forward(layer query key value kv_cache attn_metadata output output_scale
        output_block_scale)
    """,
    "vllm.v1.attention.backend:AttentionMetadataBuilder": """
        build(common_prefix_len common_attn_metadata fast_build)
    """,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend": """
        supports_kv_cache_dtype(kv_cache_dtype) supports_combination(head_size dtype
        kv_cache_dtype block_size use_mla has_sink use_sparse use_mm_prefix device_capability)
        get_impl_cls() get_builder_cls() get_name() supports_head_size(head_size)
        supports_attn_type(attn_type) supports_sliding_window() supports_mm_prefix()
        supports_non_causal() supports_sink() supports_rswa() supports_batch_invariance()
        supports_per_head_quant_scales()
    """,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl": """
        forward(layer query key value kv_cache attn_metadata output output_scale
        output_block_scale)
    """,
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder": """
        get_cudagraph_support(vllm_config kv_cache_spec) build(common_prefix_len
        common_attn_metadata fast_build)
    """,
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": """
        cache_blocks(request num_tokens retention_interval replay_boundaries)
    """,
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": """
        get_num_blocks_to_allocate(request_id num_tokens new_computed_blocks
        total_computed_tokens num_local_computed_tokens num_tokens_main_model
        apply_admission_cap prefill_end) allocate_new_blocks(request_id num_tokens
        num_tokens_main_model) remove_skipped_blocks(request_id processed_computed_tokens
        num_prompt_tokens) pop_blocks_for_free(request_id)
    """,
    "vllm.v1.kv_cache_interface:AttentionSpec": """
        max_num_blocks_per_req(vllm_config max_len)
    """,
    "vllm.v1.kv_cache_interface:FullAttentionSpec": """
        merge(specs) max_memory_usage_bytes(vllm_config)
    """,
    "vllm.v1.kv_cache_interface:KVCacheSpec": """
        is_uniform_with_collection(kv_cache_specs)
    """,
    "vllm.v1.metrics.loggers:StatLoggerBase": """
        record(scheduler_stats iteration_stats mm_cache_stats engine_idx)
        log_engine_initialized()
    """,
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState": """
        add_request(req_index new_req_data) prepare_attn(input_batch cudagraph_mode block_tables
        slot_mappings attn_groups kv_cache_config for_capture ubatch_idx
        model_specific_attn_metadata)
    """,
    "vllm.v1.worker.gpu.model_states.interface:ModelState": """
        initialize_kv_cache(kv_cache_config block_tables)
    """,
}
# Attributes that we read or set, of objects that vLLM makes.
ATTRIBUTES = {
    "vllm.config:VllmConfig": "additional_config attention_config cache_config compilation_config "
    "kv_transfer_config model_config parallel_config scheduler_config speculative_config "
    "use_v2_model_runner",
    "vllm.config:CacheConfig": "block_size cache_dtype enable_prefix_caching kv_offloading_size "
    "num_gpu_blocks user_specified_block_size",
    "vllm.config:CompilationConfig": "custom_ops static_forward_context",
    "vllm.config:ModelConfig": "dtype enforce_eager get_head_size get_num_attention_heads "
    "get_num_kv_heads get_sliding_window get_total_num_hidden_layers get_total_num_kv_heads "
    "hf_config hf_text_config is_attention_free is_encoder_decoder is_hybrid max_model_len model "
    "model_arch_config rswa_window runner_type served_model_name use_mla",
    "vllm.config:ParallelConfig": "decode_context_parallel_size pipeline_parallel_size "
    "prefill_context_parallel_size tensor_parallel_size use_ubatching",
    "vllm.config:SchedulerConfig": "disable_chunked_mm_input disable_hybrid_kv_cache_manager "
    "long_prefill_token_threshold max_num_batched_tokens max_num_seqs",
    "vllm.config:SpeculativeConfig": "method num_speculative_tokens",
    "vllm.config:AttentionConfig": "backend backend_per_kind",
    "vllm.engine.arg_utils:EngineArgs": "attention_backend attention_config create_engine_config",
    "vllm.model_executor.layers.attention.attention:Attention": "get_attn_backend impl kv_cache",
    "vllm.v1.core.block_pool:BlockPool": "get_num_free_blocks num_gpu_blocks",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "single_type_managers",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "coordinator",
    "vllm.v1.core.sched.output:NewRequestData": "mm_features prompt_len prompt_token_ids req_id "
    "sampling_params",
    "vllm.v1.core.sched.scheduler:Scheduler": "kv_cache_manager requests",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": "block_pool block_size "
    "req_to_blocks",
    "vllm.v1.engine:EngineCoreOutputs": "scheduler_stats",
    "vllm.v1.engine.async_llm:AsyncLLM": "logger_manager",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups num_blocks",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry": "_ensure_registered",
    "vllm.v1.metrics.loggers:StatLoggerManager": "engine_indexes stat_loggers",
    "vllm.v1.metrics.stats:SchedulerStats": "ec_connector_stats",
    "vllm.v1.request:Request": "num_prompt_tokens num_tokens request_id sampling_params",
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": "model_runner_output",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "idx_mapping idx_mapping_np num_reqs "
    "num_reqs_after_padding num_scheduled_tokens positions prefill_len_np query_start_loc "
    "query_start_loc_np seq_lens seq_lens_cpu_upper_bound",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "model_state",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState": "device dtype max_model_len "
    "max_num_reqs max_num_tokens vllm_config",
}


@dataclass(frozen=True)
class Finding:
    """One thing of vLLM's that SPARSEMM needs.

    Attributes:
        use: what SPARSEMM does with it.
        symbol: `module:qualified.name`.
        problem: what is wrong with it, if anything.
    """

    use: str
    symbol: str
    problem: str | None


def check() -> list[Finding]:
    """Look for everything, in any version of vLLM."""
    wrapped = [wrap.symbol for wrap in (*WRAPPED, *WRAPPED_IN_WORKERS)]
    return [
        *(Finding("wrapped", s.path, _problem(s)) for s in wrapped),
        *(Finding("relied on", s.path, _problem(s)) for s in RELIED_ON),
        *(Finding("overridden", s.path, _problem(s, exact=True)) for s in overridden()),
        *(
            Finding("attribute", f"{path}.{name}", _missing_attribute(path, name))
            for path, names in ATTRIBUTES.items()
            for name in names.split()
        ),
        *(Finding("imported", s.path, _problem(s)) for s in imported()),
    ]


def overridden() -> Iterator[Symbol]:
    """`OVERRIDDEN`, method by method."""
    for path, methods in OVERRIDDEN.items():
        for name, parameters in re.findall(r"(\w+)\(([^)]*)\)", methods):
            yield Symbol(f"{path}.{name}", tuple(parameters.split()))


def imported() -> list[Symbol]:
    """What any of our modules imports from vLLM, read from their source."""
    found = set()
    for file in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return [Symbol(path, ()) for path in sorted(found)]


def _problem(symbol: Symbol, exact: bool = False) -> str | None:
    """What is wrong with a symbol; `exact` counts new parameters too."""
    try:
        if not symbol.parameters and not exact:  # modules and classes have no signature to check
            symbol.resolve()
            return None
        if (problem := symbol.problem()) or not exact:
            return problem
        holder, name = symbol.resolve()
        found = inspect.signature(getattr(holder, name)).parameters
        new = [p for p in found if p not in ("self", *symbol.parameters)]
        return f"{symbol.path} has the new parameter {', '.join(new)}" if new else None
    except Exception as error:  # a module of another release may fail in any way, and is listed
        return f"{symbol.path}: {type(error).__name__}: {error}"


def _missing_attribute(path: str, name: str) -> str | None:
    """What is wrong with an attribute that instances of a class have."""
    module, _, class_name = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module), class_name)
        if any(_defines(base, name) for base in cls.__mro__):
            return None
        return f"{path} has no attribute {name}"
    except Exception as error:  # as above
        return f"{path}.{name}: {type(error).__name__}: {error}"


def _defines(cls: Any, name: str) -> bool:
    """Whether a class has the attribute, declares it, or sets it on its instances."""
    if name in vars(cls) or name in getattr(cls, "__annotations__", {}):
        return True
    if not cls.__module__.startswith("vllm"):
        return False
    return re.search(rf"\bself\.{name}\b[^=\n]*=[^=]", inspect.getsource(cls)) is not None


def print_findings(findings: list[Finding], console: Console, everything: bool = False) -> int:
    """Print what moved, or everything, as a table.

    Returns:
        The exit status: 1 if anything moved or the version is not supported.
    """
    version = patches.version_problem()
    moved = [finding for finding in findings if finding.problem]
    if shown := findings if everything else moved:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", "use", "finding"):
            table.add_column(column, overflow="fold")
        for finding in shown:
            mark = Text("moved", "red") if finding.problem else Text("ok", "green")
            table.add_row(mark, finding.use, Text(finding.problem or finding.symbol))
        console.print(table)
    fine = len(findings) - len(moved)
    console.print(
        f"vLLM {patches.version('vllm')}: {fine} of {len(findings)} symbols are as SPARSEMM "
        f"expects them{f', {len(moved)} moved' if moved else ''}.",
        highlight=False,
    )
    if version is not None:
        console.print(f"{version}.", highlight=False, markup=False)
    return 1 if moved or version else 0
