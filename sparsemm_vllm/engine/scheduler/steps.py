"""What vLLM's scheduler does differently before and after a step: order, ends, early frees."""

import math
from itertools import pairwise
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy

from sparsemm_vllm.engine.scheduler.manager import SparseMMManager, find_manager
from sparsemm_vllm.engine.vllm_api.versions import end_with_error


def order_by_priority(scheduler: Any) -> None:
    """Put the running requests in the order of their priorities: the last is preempted first.

    With priorities, vLLM preempts the request of the lowest one, wherever it stands. One that was
    scheduled earlier in the same step keeps its hashes of blocks, and of pictures, that no worker
    will compute, and whoever hits them reads what was there before. In this order the victim is the
    last, which was not scheduled yet. Requests that arrived at the same moment are told apart by
    the smallest difference that two times can have.

    Args:
        scheduler: scheduler of the engine, before it schedules a step.
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
        scheduler: scheduler of the engine.
        manager: manager of the pruned layers' blocks.
    """
    for request_id, message in manager.refused.items():
        if request_id in scheduler.requests:
            end_with_error(scheduler, request_id, message)
    manager.refused.clear()


def free_pruned_blocks(scheduler: Any, scheduler_output: Any) -> None:
    """Give back the prompt blocks before the window, as soon as the step that pruned is processed.

    vLLM alone does so when the request itself needs a block; until then others would be preempted.

    Args:
        scheduler: scheduler of the engine.
        scheduler_output: output of the scheduler for the step.
    """
    manager = find_manager(scheduler.kv_cache_manager)
    if manager is None:
        return
    for request_id in scheduler_output.num_scheduled_tokens:
        request, prompt = scheduler.requests.get(request_id), manager.prompts.get(request_id)
        if request is not None and prompt is not None and not prompt.is_complete:
            processed = request.num_computed_tokens - request.num_in_flight_tokens
            manager.remove_skipped_blocks(request_id, processed)
