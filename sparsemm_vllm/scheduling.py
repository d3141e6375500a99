"""The scheduler's side of the window queries: the last chunk of a prompt holds all of them."""

from typing import Any

from sparsemm_vllm.kv_cache import SparseMMManager
from sparsemm_vllm.request_stats import Outcome


class _HitLimited:
    """A request as a prefix lookup may see it: a hit ends one token before `num_tokens`."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def find_manager(kv_cache_manager: Any) -> SparseMMManager | None:
    """The manager of the pruned layers, if vLLM's has one."""
    managers = kv_cache_manager.coordinator.single_type_managers
    return next((m for m in managers if isinstance(m, SparseMMManager)), None)


def limit_prefix_hit(kv_cache_manager: Any, request: Any) -> Any:
    """Tell the manager the request's prompt and settings; let a hit reach `n - W` tokens at most.

    For a request that is resumed after preemption too: another chat may have cached its prompt and
    answer, but its own answer was computed from a pruned prompt and must be again.
    """
    manager = find_manager(kv_cache_manager)
    if manager is None:
        return request
    prompt = manager.register(request)
    if prompt.outcome is not Outcome.PRUNED:
        return request
    hit_limit = prompt.tokens - prompt.layout.last_chunk
    return _HitLimited(request, min(request.num_tokens, hit_limit + 1))


def shape_chunk(
    kv_cache_manager: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
) -> int:
    """Tokens to schedule, so that a chunk ends with the prompt or leaves the whole window.

    Args:
        kv_cache_manager: vLLM's.
        request: vLLM's.
        num_computed_tokens: tokens before the chunk.
        num_new_tokens: tokens that vLLM would schedule.

    Returns:
        At most `num_new_tokens`; 0 if the step has no room for the window.
    """
    n = request.num_prompt_tokens
    if num_computed_tokens >= n:
        return num_new_tokens
    manager = find_manager(kv_cache_manager)
    if manager is None:
        return num_new_tokens
    prompt = manager.prompts[request.request_id]
    if prompt.outcome is not Outcome.PRUNED:
        return num_new_tokens
    end = num_computed_tokens + num_new_tokens
    if end > n:
        return n - num_computed_tokens
    last_chunk_start = n - prompt.layout.last_chunk
    if last_chunk_start < end < n:
        return max(0, last_chunk_start - num_computed_tokens)
    return num_new_tokens
