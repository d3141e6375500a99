"""Everything that is wrapped in vLLM, and the check before it is.

`WRAPPED` and `WRAPPED_IN_WORKERS` list functions that get something around them because vLLM offers
no hook there, each with the reason. Before any is wrapped, what SPARSEMM needs of vLLM is compared
with what was recorded of that release (`contract.py`): if anything moved that SPARSEMM would fail
with, it does not start, and lists all of it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from sparsemm_vllm import contract
from sparsemm_vllm.environment import admits_any_vllm
from sparsemm_vllm.signatures import argument

SUPPORTED = ("0.32", "0.34")
LIMITS = "_sparsemm_limits"  # of a front end's `InputProcessor`


class IncompatibleError(RuntimeError):
    """This vLLM is not one that SPARSEMM was written for."""


@dataclass(frozen=True)
class Wrap:
    """A function that gets something around it.

    Attributes:
        symbol: vLLM's function, ``module:qualified.name``.
        reason: why no hook of vLLM's serves.
        wrapper: function that makes ours from vLLM's.
    """

    symbol: str
    reason: str
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]

    def install(self) -> None:
        """Put the wrapper in place, once."""
        holder, name = contract.resolve(self.symbol)
        original = getattr(holder, name)
        if not hasattr(original, "__sparsemm__"):
            wrapped = functools.wraps(original)(self.wrapper(original))
            wrapped.__sparsemm__ = True  # type: ignore[attr-defined]
            setattr(holder, name, wrapped)

    def is_installed(self) -> bool:
        """Whether the wrapper is in place."""
        holder, name = contract.resolve(self.symbol)
        return hasattr(getattr(holder, name), "__sparsemm__")


def _layer_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.layer_spec import sparse_spec

    def get_kv_cache_spec(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        return sparse_spec(self, original(self, vllm_config, *args, **kwargs), vllm_config)

    return get_kv_cache_spec


def _model_state(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.model_state import sparse_model_state

    def resolve_model_state_cls(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        return sparse_model_state(original(vllm_config, *args, **kwargs), vllm_config)

    return resolve_model_state_cls


def _computed_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.scheduling import prefix_hit_limit
    from sparsemm_vllm.versions import bounded_lookup

    look_up = bounded_lookup(original)

    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        limit = prefix_hit_limit(self, request)
        if limit is None:
            return original(self, request, *args, **kwargs)
        return look_up(limit, self, request, *args, **kwargs)

    return get_computed_blocks


def _chunk_end(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.scheduling import shape_chunk
    from sparsemm_vllm.window_pictures import make_room_for_window

    def _reserve_prefill_lookahead(
        self: Any,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        end = num_computed_tokens + num_new_tokens
        num_new_tokens = original(
            self, request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )
        tokens = shape_chunk(self.kv_cache_manager, request, num_computed_tokens, num_new_tokens)
        if tokens == 0 < num_new_tokens and request.has_encoder_inputs:
            make_room_for_window(self, request, num_computed_tokens, end)
        return tokens

    return _reserve_prefill_lookahead


def _request_check(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import VLLMValidationError

    from sparsemm_vllm.layer_spec import uses_sparsemm
    from sparsemm_vllm.request_settings import (
        RequestError,
        RequestLimits,
        asks_for_us,
        check_request,
    )
    from sparsemm_vllm.sampling_limits import too_long
    from sparsemm_vllm.settings import Settings

    def limits_of(processor: Any) -> RequestLimits:
        if not hasattr(processor, LIMITS):  # a head profile among the settings takes a millisecond
            settings = Settings.from_additional_config(processor.vllm_config.additional_config)
            setattr(processor, LIMITS, RequestLimits.of(settings))
        return getattr(processor, LIMITS)

    is_resumable = argument(original, "resumable")

    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not uses_sparsemm(self.vllm_config):
            return original(self, request_id, prompt, params, *args, **kwargs)
        if is_resumable(self, request_id, prompt, params, *args, **kwargs):
            raise VLLMValidationError(
                "SPARSEMM does not serve streaming input: it prunes a prompt when the prompt is "
                "complete, and a streamed one never is"
            )
        extra_args = getattr(params, "extra_args", None) or {}  # pooling: vLLM refuses it
        if asks_for_us(extra_args):
            try:
                check_request(extra_args, limits_of(self))
            except RequestError as error:  # HTTP 400: of other errors vLLM makes a 500
                raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if problem := too_long(request.sampling_params):
            raise VLLMValidationError(problem)
        return request

    return process_inputs


def _step_begins(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.scheduling import end_refused, find_manager, order_by_priority

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        manager = find_manager(self.kv_cache_manager)
        if manager is None:
            return original(self, *args, **kwargs)
        order_by_priority(self)
        output = original(self, *args, **kwargs)
        manager.watchdog.observe(self, output)
        end_refused(self, manager)
        return output

    return schedule


def _step_ends(original: Callable[..., Any]) -> Callable[..., Any]:
    from sparsemm_vllm.metrics import send
    from sparsemm_vllm.scheduling import free_pruned_blocks
    from sparsemm_vllm.window_pictures import take_room_back

    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = original(self, scheduler_output, model_runner_output, *args, **kwargs)
        free_pruned_blocks(self, scheduler_output)
        take_room_back(self)
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

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        runner_output = getattr(output, "model_runner_output", None)
        if runner_output is not None and isinstance(self.model_state, SparseMMModelState):
            setattr(runner_output, PRUNE_SECONDS, self.model_state.take_prune_seconds())
        return output

    return sample_tokens


WRAPPED = (
    Wrap(
        "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec",
        "a backend's customize_spec knows neither the layer nor the model, the budgets depend on "
        "both",
        _layer_spec,
    ),
    Wrap(
        "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
        "the model state is chosen by the model alone; ours puts generated tokens into the blocks "
        "behind the compact ones",
        _model_state,
    ),
    Wrap(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        "a prefix hit must leave the window queries to compute, and the manager must know the "
        "prompt's length before admission",
        _computed_blocks,
    ),
    Wrap(
        "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
        "the chunk that ends a prompt must hold all of its window queries, and end with it",
        _chunk_end,
    ),
    Wrap(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "streaming input extends a prompt after its prefill, and what a request must not ask for "
        "has to be refused before the engine sees it",
        _request_check,
    ),
    Wrap(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "with priorities it preempts requests that it has scheduled in the same step, and what "
        "can never be scheduled it tries for ever",
        _step_begins,
    ),
    Wrap(
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "the blocks of a prompt are free when the step that pruned it is processed, not when the "
        "request next needs one; nothing tells a plugin that a step is done; and the scheduler's "
        "statistics have no place for a plugin's own numbers",
        _step_ends,
    ),
    Wrap(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "a stat logger plugin would switch statistics on in every vLLM, with or without SPARSEMM",
        _stat_loggers,
    ),
)
# Only workers import the model runner: it takes seconds.
WRAPPED_IN_WORKERS = (
    Wrap(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.profile_cudagraph_memory",
        "the model runner drops the KV cache that it measured CUDA graphs with, and no hook of a "
        "model state is called then; its memory is wanted for the real cache",
        _graph_memory,
    ),
    Wrap(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
        "a model state cannot add to a step's output; the time of pruning is known to the worker",
        _prune_seconds,
    ),
)


def version_problem() -> str | None:
    """Why the installed vLLM is not one of the supported ones, if it is not. Imports nothing."""
    lowest, above = map(Version, SUPPORTED)
    installed = Version(version("vllm"))
    if admits_any_vllm():
        return None
    if not lowest <= Version(installed.base_version) < above:
        return (
            f"vLLM {installed} is installed; SPARSEMM supports >={lowest},<{above} "
            "(`sparsemm check --run` says what differs, and whether it would serve)"
        )
    if installed.local is not None and "cpu" in installed.local:
        return (
            f"vLLM {installed} is a build for the CPU, whose kernels SPARSEMM does not know; "
            "install the ordinary wheel (pip install vllm): with it `sparsemm serve` works "
            "without a GPU"
        )
    return None


def every_wrap() -> list[Wrap]:
    """All wraps, those of the CPU's model runner and of the entry points too."""
    from sparsemm_vllm.cpu_runner import TWINS
    from sparsemm_vllm.plugin import _install_if_asked

    entry = Wrap(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "a plugin that finds a configuration which asks for it must be installed before it is used",
        _install_if_asked,
    )
    return [*WRAPPED, *WRAPPED_IN_WORKERS, *TWINS, entry]


def differences() -> list[contract.Difference]:
    """What in the modules of vLLM that this process has loaded is not as it was recorded."""
    known = contract.nearest(version("vllm"))
    return contract.compare(known, every_wrap(), loaded_only=True)


def problems() -> list[str]:
    """What keeps SPARSEMM from working in the installed vLLM; empty if nothing does.

    What differs and does not break it is a warning in vLLM's log.
    """
    if found := version_problem():
        return [found]
    gone = []
    for wrap in WRAPPED:
        try:
            contract.resolve(wrap.symbol)
        except (ImportError, AttributeError) as error:
            gone.append(f"{wrap.symbol}: {error}")
    return gone or _breaking(differences())


def _breaking(found: list[contract.Difference]) -> list[str]:
    """Those that break SPARSEMM; the others are logged, and all where any vLLM is to be tried."""
    from vllm.logger import init_logger

    breaking = [] if admits_any_vllm() else [d for d in found if d.breaks]
    if harmless := [str(difference) for difference in found if difference not in breaking]:
        init_logger("vllm.sparsemm").warning(
            "SPARSEMM: vLLM %s is not in all as the %s that SPARSEMM was tested with; run "
            "`sparsemm check --run` before you rely on it: %s",
            version("vllm"),
            contract.nearest(version("vllm")).vllm,
            "; ".join(harmless),
        )
    return [str(difference) for difference in breaking]


def install() -> None:
    """Register the KV cache spec and wrap what `WRAPPED` lists. Idempotent.

    Raises:
        IncompatibleError: listing everything that SPARSEMM would fail with.
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
        IncompatibleError: listing everything that SPARSEMM would fail with.
    """
    for wrap in WRAPPED_IN_WORKERS:
        contract.resolve(wrap.symbol)  # imports it
    if found := _breaking(differences()):
        raise IncompatibleError("SPARSEMM cannot run on this vLLM: " + "; ".join(found))
    for wrap in WRAPPED_IN_WORKERS:
        wrap.install()


def require_installed() -> None:
    """Refuse to run half installed: without its hooks SPARSEMM would read freed blocks.

    Raises:
        IncompatibleError: if `install` did not run in this process.
    """
    missing = [wrap.symbol for wrap in WRAPPED if not wrap.is_installed()]
    if missing:
        raise IncompatibleError(
            "SPARSEMM is not installed in this process; build the engine from EngineArgs, or call "
            f"sparsemm_vllm.patches.install() first (missing: {', '.join(missing)})"
        )
