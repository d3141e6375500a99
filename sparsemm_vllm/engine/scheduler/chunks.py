"""What vLLM's scheduler does differently: chunks that hold the window, order, and early frees."""

import math
from itertools import pairwise
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy

from sparsemm_vllm.kv_cache import SparseMMManager
from sparsemm_vllm.request_stats import Outcome
from sparsemm_vllm.versions import end_with_error


def find_manager(kv_cache_manager: Any) -> SparseMMManager | None:
    """The manager of the pruned layers, if vLLM's has one."""
    managers = kv_cache_manager.coordinator.single_type_managers
    return next((m for m in managers if isinstance(m, SparseMMManager)), None)


def prefix_hit_limit(kv_cache_manager: Any, request: Any) -> int | None:
    """Tell the manager the request's prompt and settings; how many tokens a hit may have then.

    For a request that is resumed after preemption too: another chat may have cached its prompt and
    answer, but its own answer was computed from a pruned prompt and must be again.

    Args:
        kv_cache_manager: vLLM's.
        request: vLLM's.

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


def order_by_priority(scheduler: Any) -> None:
    """Put the running requests in the order of their priorities: the last is preempted first.

    With priorities, vLLM preempts the request of the lowest one, wherever it stands. One that was
    scheduled earlier in the same step keeps its hashes of blocks, and of pictures, that no worker
    will compute, and whoever hits them reads what was there before. In this order the victim is the
    last, which was not scheduled yet. Requests that arrived at the same moment are told apart by
    the smallest difference that two times can have.

    Args:
        scheduler: vLLM's, before it schedules a step.
    """
    if scheduler.policy is not SchedulingPolicy.PRIORITY:
        return
    scheduler.running.sort(key=lambda request: (request.priority, request.arrival_time))
    for earlier, later in pairwise(scheduler.running):
        if later.priority == earlier.priority and later.arrival_time <= earlier.arrival_time:
            later.arrival_time = math.nextafter(earlier.arrival_time, math.inf)


def end_refused(scheduler: Any, manager: SparseMMManager) -> None:
    """End the requests that the manager found no worker can serve, with an error.

    Args:
        scheduler: vLLM's.
        manager: of its pruned layers.
    """
    for request_id, message in manager.refused.items():
        if request_id in scheduler.requests:
            end_with_error(scheduler, request_id, message)
    manager.refused.clear()


def free_pruned_blocks(scheduler: Any, scheduler_output: Any) -> None:
    """Give back the older blocks of prompts that a step has pruned, as soon as it is processed.

    vLLM alone does so when the request itself needs a block; until then others would be preempted.

    Args:
        scheduler: vLLM's.
        scheduler_output: of the step.
    """
    manager = find_manager(scheduler.kv_cache_manager)
    if manager is None:
        return
    for request_id in scheduler_output.num_scheduled_tokens:
        request, prompt = scheduler.requests.get(request_id), manager.prompts.get(request_id)
        if request is not None and prompt is not None and not prompt.is_complete:
            processed = request.num_computed_tokens - request.num_in_flight_tokens
            manager.remove_skipped_blocks(request_id, processed)
