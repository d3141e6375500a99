"""Ends a request that can never be scheduled, where vLLM would wait for ever without a word."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from sparsemm_vllm.budget.request import SHOWN
from sparsemm_vllm.engine.vllm_api.versions import end_with_error

logger = init_logger("vllm.sparsemm")

PATIENCE = 1000  # steps; vLLM sleeps a millisecond after each that schedules nothing
COULD_RUN = (RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.PREEMPTED)


class Watchdog:
    """Counts steps in which nothing is scheduled though nothing is in flight either.

    Then the next step finds what this one found, and so do all others.

    Args:
        patience: number of such steps, one after another, until a request is ended.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self.idle_steps = 0

    def observe(self, scheduler: Any, scheduler_output: Any) -> None:
        """Look at a step; end a request with an error if too many were idle.

        Args:
            scheduler: scheduler of the engine.
            scheduler_output: output of the scheduler for the step.
        """
        stuck = None
        if not scheduler_output.total_num_scheduled_tokens:
            stuck = self._stuck(scheduler)
        self.idle_steps = self.idle_steps + 1 if stuck is not None else 0
        if stuck is not None and self.idle_steps >= self.patience:
            self.idle_steps = 0
            message = self._describe(scheduler, stuck)
            logger.error(message)
            end_with_error(scheduler, stuck.request_id, message)

    @staticmethod
    def _stuck(scheduler: Any) -> Request | None:
        """A request that could run and does not, though nothing else will change that."""
        requests = scheduler.requests.values()
        if scheduler.pause_state != PauseState.UNPAUSED or scheduler.ec_connector is not None:
            return None  # somebody resumes it; another instance sends what its encoder makes
        if any(request.num_in_flight_tokens for request in requests):
            return None
        could_run = [request for request in requests if request.status in COULD_RUN]
        running = [request for request in could_run if request.status == RequestStatus.RUNNING]
        return next(iter(running or could_run), None)

    def _describe(self, scheduler: Any, request: Request) -> str:
        pool = scheduler.kv_cache_manager.block_pool
        return (
            f"SPARSEMM: request {request.request_id[:SHOWN]} is ended with an error: nothing was "
            f"scheduled in {self.patience:,} steps. It is {request.status.name.lower()}, and "
            f"{request.num_computed_tokens:,} of its {request.num_tokens:,} tokens are computed; "
            f"{pool.get_num_free_blocks():,} of {pool.num_gpu_blocks - 1:,} KV blocks are free, a "
            f"step takes {scheduler.max_num_scheduled_tokens:,} tokens. It needs more blocks, or "
            "larger steps, than there are"
        )
