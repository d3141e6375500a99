"""What is put around functions of vLLM, where it offers no hook; `hooks.py` says why at each."""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from sparsemm_vllm.budget.request import RequestError, asks_for_us, check_request
from sparsemm_vllm.engine.config import Serving, uses_sparsemm
from sparsemm_vllm.engine.frontend.metrics import SparseMMStatLogger
from sparsemm_vllm.engine.sampling_limits import too_long
from sparsemm_vllm.engine.scheduler.chunks import prefix_hit_limit, shape_chunk
from sparsemm_vllm.engine.scheduler.encoder_room import make_room_for_window, take_room_back
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager, find_manager
from sparsemm_vllm.engine.scheduler.send_stats import send
from sparsemm_vllm.engine.scheduler.steps import (
    end_refused,
    free_pruned_blocks,
    order_by_priority,
)
from sparsemm_vllm.engine.spec import SparseMMSpec, sparse_spec
from sparsemm_vllm.engine.vllm_api import hooks
from sparsemm_vllm.engine.vllm_api.compatibility import require_compatible_worker
from sparsemm_vllm.engine.vllm_api.hooks import Function
from sparsemm_vllm.engine.vllm_api.signatures import argument
from sparsemm_vllm.engine.vllm_api.versions import bounded_lookup
from sparsemm_vllm.engine.worker.model_state import SparseMMModelState, sparse_model_state
from sparsemm_vllm.names import PRUNE_SECONDS


def _layer_spec(original: Function) -> Function:
    def get_kv_cache_spec(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        return sparse_spec(self, original(self, vllm_config, *args, **kwargs), vllm_config)

    return get_kv_cache_spec


def _model_state(original: Function) -> Function:
    def resolve_model_state_cls(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = original(vllm_config, *args, **kwargs)
        if not uses_sparsemm(vllm_config):
            return chosen
        install_in_worker()
        return sparse_model_state(chosen)

    return resolve_model_state_cls


def _computed_blocks(original: Function) -> Function:
    look_up = bounded_lookup(original)

    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        limit = prefix_hit_limit(self, request)
        if limit is None:
            return original(self, request, *args, **kwargs)
        return look_up(limit, self, request, *args, **kwargs)

    return get_computed_blocks


def _chunk_end(original: Function) -> Function:
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


def _request_check(original: Function) -> Function:
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
                check_request(extra_args, Serving.of(self.vllm_config).limits)
            except RequestError as error:  # HTTP 400: of other errors vLLM makes a 500
                raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if problem := too_long(request.sampling_params):
            raise VLLMValidationError(problem)
        return request

    return process_inputs


def _step_begins(original: Function) -> Function:
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


def _step_ends(original: Function) -> Function:
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = original(self, scheduler_output, model_runner_output, *args, **kwargs)
        free_pruned_blocks(self, scheduler_output)
        take_room_back(self)
        send(self, model_runner_output, outputs)
        return outputs

    return update_from_output


def _stat_loggers(original: Function) -> Function:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        if uses_sparsemm(vllm_config):  # first: it takes out what others would not understand
            self.stat_loggers.insert(0, SparseMMStatLogger(vllm_config, self.engine_indexes))

    return __init__


def _graph_memory(original: Function) -> Function:
    def profile_cudagraph_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        estimate = original(self, *args, **kwargs)
        if isinstance(self.model_state, SparseMMModelState):
            self.model_state.release_kv_cache()
        return estimate

    return profile_cudagraph_memory


def _prune_seconds(original: Function) -> Function:
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        runner_output = getattr(output, "model_runner_output", None)
        if runner_output is not None and isinstance(self.model_state, SparseMMModelState):
            setattr(runner_output, PRUNE_SECONDS, self.model_state.take_prune_seconds())
        return output

    return sample_tokens


WRAPPERS = {
    hooks.LAYER_SPEC: _layer_spec,
    hooks.MODEL_STATE: _model_state,
    hooks.COMPUTED_BLOCKS: _computed_blocks,
    hooks.CHUNK_END: _chunk_end,
    hooks.REQUEST_CHECK: _request_check,
    hooks.STEP_BEGINS: _step_begins,
    hooks.STEP_ENDS: _step_ends,
    hooks.STAT_LOGGERS: _stat_loggers,
}
WORKER_WRAPPERS = {hooks.GRAPH_MEMORY: _graph_memory, hooks.PRUNE_TIME: _prune_seconds}


def install() -> None:
    """Register the KV cache spec and wrap what every process has. Idempotent.

    `plugin.install` checks before whether this vLLM is as SPARSEMM needs it.
    """
    KVCacheSpecRegistry._ensure_registered()  # only an empty registry gets vLLM's own specs
    KVCacheSpecRegistry.register(SparseMMSpec, SparseMMManager, SparseMMSpec)
    for hook, wrapper in WRAPPERS.items():
        hook.install(wrapper)


def install_in_worker() -> None:
    """Wrap what only workers have. Idempotent.

    Raises:
        IncompatibleError: listing everything that SPARSEMM would fail with.
    """
    require_compatible_worker()
    for hook, wrapper in WORKER_WRAPPERS.items():
        hook.install(wrapper)
