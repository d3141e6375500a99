"""The functions of vLLM that get something around them, as data: which, why, and until when."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsemm_vllm.engine.vllm_api.contract import resolve

Function = Callable[..., Any]


@dataclass(frozen=True)
class Hook:
    """A function of vLLM's that gets something around it.

    Attributes:
        symbol: path of vLLM's function, ``module:qualified.name``.
        wrapper: path of the function of ours that makes the new one from vLLM's, ``module:name``.
        reason: sentence that says why no hook that vLLM offers serves.
        until: change in vLLM that would make this one unnecessary.
    """

    symbol: str
    wrapper: str
    reason: str
    until: str

    def install(self, wrapper: Callable[[Function], Function]) -> None:
        """Put the wrapper in place, once."""
        holder, name = resolve(self.symbol)
        original = getattr(holder, name)
        if not hasattr(original, "__sparsemm__"):
            wrapped = functools.wraps(original)(wrapper(original))
            wrapped.__sparsemm__ = True  # type: ignore[attr-defined]
            setattr(holder, name, wrapped)

    def is_installed(self) -> bool:
        """Whether the wrapper is in place."""
        holder, name = resolve(self.symbol)
        return hasattr(getattr(holder, name), "__sparsemm__")


_PATCHES = "sparsemm_vllm.engine.patches"

ENGINE_CONFIG = Hook(
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "sparsemm_vllm.plugin:_prepare_if_asked",
    "a plugin that finds a configuration which asks for it must be installed before it is used",
    "a backend class may check and change the configuration that chose it, in every process",
)

LAYER_SPEC = Hook(
    "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec",
    f"{_PATCHES}:_layer_spec",
    "a backend's customize_spec knows neither the layer nor the model, the budgets depend on both",
    "customize_spec is given the layer and the configuration",
)
MODEL_STATE = Hook(
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
    f"{_PATCHES}:_model_state",
    "the model state is chosen by the model alone; ours puts generated tokens into the blocks "
    "behind the compact ones",
    "an attention backend or a plugin may name the model state",
)
COMPUTED_BLOCKS = Hook(
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
    f"{_PATCHES}:_computed_blocks",
    "a prefix hit must leave the window queries to compute, and the manager must know the "
    "prompt's length before admission",
    "a single-type manager is shown the request, and may bound its prefix hit",
)
CHUNK_END = Hook(
    "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
    f"{_PATCHES}:_chunk_end",
    "the chunk that ends a prompt must hold all of its window queries, and end with it",
    "a single-type manager may say where a chunk of a prompt must not end",
)
REQUEST_CHECK = Hook(
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    f"{_PATCHES}:_request_check",
    "streaming input extends a prompt after its prefill, and what a request must not ask for has "
    "to be refused before the engine sees it",
    "a platform or a plugin may validate each request of the front end",
)
STEP_BEGINS = Hook(
    "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    f"{_PATCHES}:_step_begins",
    "with priorities it preempts requests that it has scheduled in the same step, and what can "
    "never be scheduled it tries for ever",
    "a preemption forgets the hashes of blocks that no worker will compute, and a request that "
    "can never be scheduled ends with an error",
)
STEP_ENDS = Hook(
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    f"{_PATCHES}:_step_ends",
    "the blocks of a prompt are free when the step that pruned it is processed, not when the "
    "request next needs one; nothing tells a plugin that a step is done; and the scheduler's "
    "statistics have no place for a plugin's own numbers",
    "a single-type manager is told of processed steps, and may add to the scheduler's statistics",
)
STAT_LOGGERS = Hook(
    "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
    f"{_PATCHES}:_stat_loggers",
    "a stat logger plugin would switch statistics on in every vLLM, with or without SPARSEMM",
    "a stat logger plugin is asked whether it is wanted with a configuration",
)
IN_EVERY_PROCESS = (
    LAYER_SPEC,
    MODEL_STATE,
    COMPUTED_BLOCKS,
    CHUNK_END,
    REQUEST_CHECK,
    STEP_BEGINS,
    STEP_ENDS,
    STAT_LOGGERS,
)

GRAPH_MEMORY = Hook(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.profile_cudagraph_memory",
    f"{_PATCHES}:_graph_memory",
    "the model runner drops the KV cache that it measured CUDA graphs with, and no hook of a "
    "model state is called then; its memory is wanted for the real cache",
    "a model state is told when a KV cache goes",
)
PRUNE_TIME = Hook(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
    f"{_PATCHES}:_prune_seconds",
    "a model state cannot add to a step's output; the time of pruning is known to the worker",
    "a model state may add to a step's output",
)
# Only workers import the model runner: it takes seconds.
IN_WORKERS = (GRAPH_MEMORY, PRUNE_TIME)


def _twin(symbol: str, wrapper: str) -> Hook:
    """A kernel of vLLM's that is replaced by operations of torch, where there is no GPU."""
    return Hook(
        symbol,
        f"sparsemm_vllm.engine.cpu.model_runner:{wrapper}",
        "Triton's interpreter runs it, slowly",
        "vLLM's V2 model runner has a path for the CPU",
    )


_TABLES = "vllm.v1.worker.gpu.block_table:BlockTables"
_RUNNER = "vllm.v1.worker.gpu.model_runner"
GATHER_BLOCK_TABLES = _twin(f"{_TABLES}.gather_block_tables", "_gather_block_tables")
SLOT_MAPPINGS = _twin(f"{_TABLES}.compute_slot_mappings", "_slot_mappings")
POSITIONS = _twin(f"{_RUNNER}:prepare_pos_seq_lens", "_positions")
SAMPLED_TOKENS = _twin(f"{_RUNNER}:combine_sampled_and_draft_tokens", "_sampled_tokens")
POST_UPDATE = _twin(f"{_RUNNER}:post_update", "_update")
GUMBEL_SAMPLE = _twin("vllm.v1.worker.gpu.sample.sampler:gumbel_sample", "_greedy")
TOP_K_TOP_P = _twin("vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p_triton", "_top_k_top_p")
ON_THE_CPU = (
    GATHER_BLOCK_TABLES,
    SLOT_MAPPINGS,
    POSITIONS,
    SAMPLED_TOKENS,
    POST_UPDATE,
    GUMBEL_SAMPLE,
    TOP_K_TOP_P,
)

HOOKS = (*IN_EVERY_PROCESS, *IN_WORKERS, *ON_THE_CPU, ENGINE_CONFIG)
