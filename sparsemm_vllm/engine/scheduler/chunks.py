"""What vLLM's scheduler does differently: chunks that hold the window, order, and early frees."""

from typing import Any

from sparsemm_vllm.engine.scheduler.manager import find_manager
from sparsemm_vllm.engine.scheduler.stats import Outcome


def prefix_hit_limit(kv_cache_manager: Any, request: Any) -> int | None:
    """Tell the manager the request's prompt and settings; how many tokens a hit may have then.

    For a request that is resumed after preemption too: another chat may have cached the same prompt
    and answer, but this request's answer was computed from a pruned prompt, and must be again.

    Args:
        kv_cache_manager: vLLM's manager of all KV caches.
        request: request that vLLM looks up in the prefix cache.

    Returns:
        ``n - W`` for a prompt that will be pruned, whose window queries must be computed; None for
        a request whose hits are not bounded by us.
    """
    manager = find_manager(kv_cache_manager)
    if manager is None:
        return None
    prompt = manager.register_prompt(request)
    if prompt.outcome is not Outcome.PRUNED:
        return None
    return prompt.tokens - prompt.layout.last_chunk


def shape_chunk(
    kv_cache_manager: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
) -> int:
    """Tokens to schedule, so that a chunk ends with the prompt or leaves the whole window.

    Args:
        kv_cache_manager: vLLM's manager of all KV caches.
        request: request that gets the chunk.
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
