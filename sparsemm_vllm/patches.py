"""Everything that is wrapped in vLLM, and everything relied on that it could change.

Two kinds of entries, both checked before anything is installed: `WRAPPED`, methods that get
something around them because vLLM offers no hook there, each with the reason; and `RELIED_ON`,
methods that we override or call, with the parameters we use. If vLLM moved, starting SPARSEMM fails
with the list of what moved.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

SUPPORTED = ("0.32", "0.34")
SETTINGS = "_sparsemm_settings"  # of a front end's `InputProcessor`


class IncompatibleError(RuntimeError):
    """This vLLM is not one that SPARSEMM was written for."""


@dataclass(frozen=True)
class Symbol:
    """A function of vLLM: `module:qualified.name`, and the parameters we count on."""

    path: str
    parameters: tuple[str, ...]

    def resolve(self) -> tuple[Any, str]:
        """The object that holds it, and its attribute name there.

        Raises:
            ImportError, AttributeError: if it is gone.
        """
        module, _, qualified = self.path.partition(":")
        *parents, name = qualified.split(".")
        holder: Any = importlib.import_module(module)
        for parent in parents:
            holder = getattr(holder, parent)
        getattr(holder, name)
        return holder, name

    def problem(self) -> str | None:
        """What is wrong with it in the installed vLLM, if anything."""
        try:
            holder, name = self.resolve()
        except (ImportError, AttributeError) as error:
            return f"{self.path}: {error}"
        found = inspect.signature(getattr(holder, name)).parameters
        missing = [p for p in self.parameters if p not in found]
        return f"{self.path} has no parameter {', '.join(missing)}" if missing else None

    def has_just_its_parameters(self) -> bool:
        """Whether it is there, with these parameters and no others."""
        if self.problem():
            return False
        holder, name = self.resolve()
        return tuple(inspect.signature(getattr(holder, name)).parameters) == self.parameters


@dataclass(frozen=True)
class Wrap:
    """A function that gets something around it."""

    symbol: Symbol
    reason: str
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]

    def install(self) -> None:
        """Put the wrapper in place, once."""
        holder, name = self.symbol.resolve()
        original = getattr(holder, name)
        if not hasattr(original, "__sparsemm__"):
            wrapped = functools.wraps(original)(self.wrapper(original))
            wrapped.__sparsemm__ = True  # type: ignore[attr-defined]
            setattr(holder, name, wrapped)

    def is_installed(self) -> bool:
        """Whether the wrapper is in place."""
        holder, name = self.symbol.resolve()
        return hasattr(getattr(holder, name), "__sparsemm__")


def _layer_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.layer_spec import sparse_spec

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        return sparse_spec(self, original(self, vllm_config), vllm_config)

    return get_kv_cache_spec


def _model_state(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.model_state import sparse_model_state

    def resolve_model_state_cls(vllm_config: Any, model: Any) -> Any:
        return sparse_model_state(original(vllm_config, model), vllm_config)

    return resolve_model_state_cls


def _computed_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.scheduling import limit_prefix_hit

    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, limit_prefix_hit(self, request), *args, **kwargs)

    return get_computed_blocks


def _chunk_end(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.scheduling import shape_chunk
    from sparsemm_vllm.window_pictures import make_room_for_window

    def _reserve_prefill_lookahead(
        self: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        end = num_computed_tokens + num_new_tokens
        num_new_tokens = original(self, request, num_computed_tokens, num_new_tokens)
        tokens = shape_chunk(self.kv_cache_manager, request, num_computed_tokens, num_new_tokens)
        if tokens == 0 < num_new_tokens and request.has_encoder_inputs:
            make_room_for_window(self, request, num_computed_tokens, end)
        return tokens

    return _reserve_prefill_lookahead


def _request_check(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import VLLMValidationError

    from sparsemm_vllm.layer_spec import uses_sparsemm
    from sparsemm_vllm.request_settings import RequestError, asks_for_us, check_request
    from sparsemm_vllm.settings import Settings

    def settings_of(processor: Any) -> Settings:
        if not hasattr(processor, SETTINGS):  # a head profile among them takes a millisecond
            settings = Settings.from_additional_config(processor.vllm_config.additional_config)
            setattr(processor, SETTINGS, settings)
        return getattr(processor, SETTINGS)

    def process_inputs(
        self: Any,
        request_id: str,
        prompt: Any,
        params: Any,
        *args: Any,
        resumable: bool = False,
        **kwargs: Any,
    ) -> Any:
        if uses_sparsemm(self.vllm_config):
            if resumable:
                raise VLLMValidationError(
                    "SPARSEMM does not serve streaming input: it prunes a prompt when the prompt "
                    "is complete, and a streamed one never is"
                )
            extra_args = getattr(params, "extra_args", None) or {}  # pooling: vLLM refuses it
            if asks_for_us(extra_args):
                try:
                    check_request(extra_args, settings_of(self))
                except RequestError as error:  # HTTP 400: of other errors vLLM makes a 500
                    raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        return original(self, request_id, prompt, params, *args, resumable=resumable, **kwargs)

    return process_inputs


def _step_statistics(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.metrics import send

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = original(self, scheduler_output, model_runner_output)
        send(self, model_runner_output, outputs)
        return outputs

    return update_from_output


def _stat_loggers(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.layer_spec import uses_sparsemm
    from sparsemm_vllm.metrics import SparseMMStatLogger

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        if uses_sparsemm(vllm_config):  # first: it takes out what others would not understand
            self.stat_loggers.insert(0, SparseMMStatLogger(vllm_config, self.engine_indexes))

    return __init__


def _graph_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.model_state import SparseMMModelState

    def profile_cudagraph_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        estimate = original(self, *args, **kwargs)
        if isinstance(self.model_state, SparseMMModelState):
            self.model_state.release_kv_cache()
        return estimate

    return profile_cudagraph_memory


def _prune_seconds(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.metrics import PRUNE_SECONDS
    from sparsemm_vllm.model_state import SparseMMModelState

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = original(self, grammar_output)
        runner_output = getattr(output, "model_runner_output", None)
        if runner_output is not None and isinstance(self.model_state, SparseMMModelState):
            setattr(runner_output, PRUNE_SECONDS, self.model_state.take_prune_seconds())
        return output

    return sample_tokens


WRAPPED = (
    Wrap(
        Symbol(
            "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec",
            ("vllm_config",),
        ),
        "a backend's customize_spec knows neither the layer nor the model, the budgets depend on "
        "both",
        _layer_spec,
    ),
    Wrap(
        Symbol("vllm.v1.worker.gpu.model_states:resolve_model_state_cls", ("vllm_config", "model")),
        "the model state is chosen by the model alone; ours puts generated tokens into the blocks "
        "behind the compact ones",
        _model_state,
    ),
    Wrap(
        Symbol("vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks", ("request",)),
        "a prefix hit must leave the window queries to compute, and the manager must know the "
        "prompt's length before admission",
        _computed_blocks,
    ),
    Wrap(
        Symbol(
            "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
            ("request", "num_computed_tokens", "num_new_tokens"),
        ),
        "the chunk that ends a prompt must hold all of its window queries, and end with it",
        _chunk_end,
    ),
    Wrap(
        Symbol(
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
            ("request_id", "prompt", "params", "resumable"),
        ),
        "streaming input extends a prompt after its prefill, and what a request must not ask for "
        "has to be refused before the engine sees it",
        _request_check,
    ),
    Wrap(
        Symbol(
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
            ("scheduler_output", "model_runner_output"),
        ),
        "the scheduler's statistics have no place for a plugin's own numbers",
        _step_statistics,
    ),
    Wrap(
        Symbol("vllm.v1.metrics.loggers:StatLoggerManager.__init__", ("self", "vllm_config")),
        "a stat logger plugin would switch statistics on in every vLLM, with or without SPARSEMM",
        _stat_loggers,
    ),
)
# Only workers import the model runner: it takes seconds.
WRAPPED_IN_WORKERS = (
    Wrap(
        Symbol("vllm.v1.worker.gpu.model_runner:GPUModelRunner.profile_cudagraph_memory", ()),
        "the model runner drops the KV cache that it measured CUDA graphs with, and no hook of a "
        "model state is called then; its memory is wanted for the real cache",
        _graph_memory,
    ),
    Wrap(
        Symbol("vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens", ("grammar_output",)),
        "a model state cannot add to a step's output; the time of pruning is known to the worker",
        _prune_seconds,
    ),
)

_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_MODEL_STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"
RELIED_ON = (
    Symbol(
        f"{_MANAGER}.get_num_blocks_to_allocate",
        ("request_id", "num_tokens", "total_computed_tokens"),
    ),
    Symbol(
        f"{_MANAGER}.allocate_new_blocks", ("request_id", "num_tokens", "num_tokens_main_model")
    ),
    Symbol(
        f"{_MANAGER}.cache_blocks",
        ("request", "num_tokens", "retention_interval", "replay_boundaries"),
    ),
    Symbol(
        f"{_MANAGER}.remove_skipped_blocks",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    Symbol(f"{_MANAGER}.pop_blocks_for_free", ("request_id",)),
    Symbol(
        "vllm.v1.core.encoder_cache_manager:EncoderCacheManager.get_cached_input_ids", ("request",)
    ),
    Symbol("vllm.v1.request:Request.get_num_encoder_embeds", ("input_id",)),
    Symbol(f"{_MANAGER}._remove_blocks_in_range", ("request_id", "first_block", "last_block")),
    Symbol(
        "vllm.v1.kv_cache_interface:FullAttentionSpec.max_num_blocks_per_req",
        ("vllm_config", "max_len"),
    ),
    Symbol("vllm.v1.kv_cache_interface:replace_as", ("spec", "target_cls", "changes")),
    Symbol(
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
        ("kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
    ),
    Symbol("vllm.exceptions:VLLMValidationError", ("message", "parameter")),
    Symbol(f"{_MODEL_STATE}.add_request", ("req_index", "new_req_data")),
    Symbol(f"{_MODEL_STATE}.initialize_kv_cache", ("kv_cache_config", "block_tables")),
    Symbol(
        f"{_MODEL_STATE}.prepare_attn",
        (
            "input_batch",
            "cudagraph_mode",
            "block_tables",
            "slot_mappings",
            "attn_groups",
            "kv_cache_config",
            "for_capture",
            "model_specific_attn_metadata",
        ),
    ),
    Symbol(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Symbol(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
        ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
)


def version_problem() -> str | None:
    """Why the installed vLLM is not one of the supported ones, if it is not. Imports nothing."""
    lowest, above = map(Version, SUPPORTED)
    installed = Version(version("vllm"))
    if not lowest <= Version(installed.base_version) < above:
        return f"vLLM {installed} is installed; SPARSEMM supports >={lowest},<{above}"
    if installed.local is not None and "cpu" in installed.local:
        return (
            f"vLLM {installed} is a build for the CPU, whose kernels SPARSEMM does not know; "
            "install the ordinary wheel (pip install vllm): with it `sparsemm serve` works "
            "without a GPU"
        )
    return None


def problems() -> list[str]:
    """What keeps SPARSEMM from working in the installed vLLM; empty if nothing does."""
    if found := version_problem():
        return [found]
    symbols = [wrap.symbol for wrap in WRAPPED] + list(RELIED_ON)
    return [found for symbol in symbols if (found := symbol.problem())]


def install() -> None:
    """Register the KV cache spec and wrap what `WRAPPED` lists. Idempotent.

    Raises:
        IncompatibleError: listing everything that is not as SPARSEMM expects it.
    """
    if found := problems():
        raise IncompatibleError("SPARSEMM cannot run on this vLLM: " + "; ".join(found))
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from sparsemm_vllm.kv_cache import SparseMMManager, SparseMMSpec

    KVCacheSpecRegistry._ensure_registered()  # only an empty registry gets vLLM's own specs
    KVCacheSpecRegistry.register(SparseMMSpec, SparseMMManager, SparseMMSpec)
    for wrap in WRAPPED:
        wrap.install()


def install_in_worker() -> None:
    """Wrap what only workers have. Idempotent.

    Raises:
        IncompatibleError: listing everything that is not as SPARSEMM expects it.
    """
    moved = [found for wrap in WRAPPED_IN_WORKERS if (found := wrap.symbol.problem())]
    if moved:
        raise IncompatibleError("SPARSEMM cannot run on this vLLM: " + "; ".join(moved))
    for wrap in WRAPPED_IN_WORKERS:
        wrap.install()


def require_installed() -> None:
    """Refuse to run half installed: without its hooks SPARSEMM would read freed blocks.

    Raises:
        IncompatibleError: if `install` did not run in this process.
    """
    missing = [wrap.symbol.path for wrap in WRAPPED if not wrap.is_installed()]
    if missing:
        raise IncompatibleError(
            "SPARSEMM is not installed in this process; build the engine from EngineArgs, or call "
            f"sparsemm_vllm.patches.install() first (missing: {', '.join(missing)})"
        )
