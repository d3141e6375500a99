"""The scheduler's side: which blocks a request holds.

A request's blocks, `P` tokens each, for a prompt of `n` tokens::

    [ prompt blocks 0..N-1 | C compact blocks | growth blocks ... ],  N = ceil(n / P)

Prompt blocks are filled by ordinary prefill and never written again, so prefix caching works on
them. In the step that computes the last prompt token the request gets `C` compact blocks. The
workers copy each head's kept tokens into them, as head pages. When that step has been processed,
the prompt blocks before the window go back to the pool.
"""

from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import SHOWN, Accepted, RequestLimits, accept
from sparsemm_vllm.engine.sampling_limits import too_long, without_too_long
from sparsemm_vllm.engine.scheduler.stats import Outcome, RequestStats
from sparsemm_vllm.engine.scheduler.watchdog import Watchdog
from sparsemm_vllm.engine.spec import SparseMMSpec

logger = init_logger("vllm.sparsemm")

ACCEPTED = "_sparsemm_accepted"  # attribute of a `Request`, which no client can write to


@dataclass(slots=True)
class Prompt:
    """What the scheduler knows of a request's prompt, until the request gives its blocks back.

    Attributes:
        tokens: length `n` of the prompt, in tokens.
        layout: cache layout for the budget that the request gets.
        outcome: reason why the prompt is pruned or not.
        compact_blocks: number of compact blocks, `C`; 0 if the prompt is not pruned.
        freed_blocks: number of prompt blocks that go back to the pool, counted from the first.
        is_complete: whether the step that ends it has been processed, and these blocks are free.
    """

    tokens: int
    layout: CacheLayout
    outcome: Outcome
    compact_blocks: int
    freed_blocks: int
    is_complete: bool = False


class SparseMMManager(FullAttentionManager):
    """Allocates compact blocks when a prompt is complete and frees the prompt blocks after it."""

    def __init__(self, kv_cache_spec: SparseMMSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.layout = kv_cache_spec.layout
        self.prune_when_free_below = kv_cache_spec.prune_when_free_below
        self.limits = kv_cache_spec.limits or RequestLimits(
            self.layout.window, self.layout.largest_budget, self.layout.rules.prunes
        )
        self.prompts: dict[str, Prompt] = {}
        self.stats = RequestStats()
        self.watchdog = Watchdog()
        self.refused: dict[str, str] = {}  # requests that no worker can serve, and why

    def register_prompt(self, request: Request) -> Prompt:
        """Decide how this request's prompt will be pruned.

        vLLM asks for prefix hits before it admits a request, on every try; this is called each
        time. The decision may change until the request is first admitted (the pool fills and
        empties). After a preemption it stays.
        """
        n = request.num_prompt_tokens
        accepted = self._accept(request)
        layout = accepted.layout(self.layout)
        prompt = Prompt(
            n,
            layout,
            self._outcome(n, layout, accepted),
            layout.compact_blocks(n, self.block_size),
            layout.freed_blocks(n, self.block_size),
        )
        self.prompts[request.request_id] = prompt
        return prompt

    def _accept(self, request: Request) -> Accepted:
        """What the request gets: kept on the request, and sent to workers in its parameters."""
        before: Accepted | None = getattr(request, ACCEPTED, None)
        accepted = before or self._check(request)
        if self.prune_when_free_below is not None and not request.num_preemptions:
            layout = replace(accepted, left_dense=False).layout(self.layout)
            n = request.num_prompt_tokens
            whole = layout.is_pruned(n) and self._has_room_for(n)
            accepted = replace(accepted, left_dense=whole)
        if accepted != before:
            setattr(request, ACCEPTED, accepted)
            request.sampling_params = accepted.send(request.sampling_params)
        return accepted

    def _check(self, request: Request) -> Accepted:
        """What a request gets that maybe no front end has checked; no worker fails with it."""
        if problem := too_long(request.sampling_params):
            request.sampling_params = without_too_long(request.sampling_params)
            self.refused[request.request_id] = problem
        accepted = accept(request.sampling_params.extra_args, self.limits)
        problem = accepted.problem
        if request.resumable:  # its prompt would grow after it was pruned
            request.resumable = False
            problem = "streaming input is not served"
        if problem is not None:
            self._report(request.request_id, problem)
        return accepted

    def _report(self, request_id: str, problem: str) -> None:
        """Count a request that asks for what cannot be; the first is logged."""
        if self.stats.count_invalid():
            logger.warning(
                "SPARSEMM: request %a was not checked by its front end: %s. It is served with the "
                "server's own settings, and counted in sparsemm:invalid_requests_total; others "
                "like it are only counted.",
                request_id[:SHOWN],
                problem,
            )

    def _has_room_for(self, prompt_tokens: int) -> bool:
        """Whether a whole prompt would leave enough blocks free."""
        free = self.block_pool.get_num_free_blocks() - cdiv(prompt_tokens, self.block_size)
        assert self.prune_when_free_below is not None
        return free >= self.prune_when_free_below * self.block_pool.num_gpu_blocks

    @staticmethod
    def _outcome(prompt_tokens: int, layout: CacheLayout, accepted: Accepted) -> Outcome:
        if layout.is_pruned(prompt_tokens):
            return Outcome.PRUNED
        if accepted.left_dense:
            return Outcome.POOL_AMPLE
        return Outcome.TOO_SHORT if layout.rules.prunes else Outcome.OPTED_OUT

    @override
    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Ours adds the compact blocks, once the tokens reach the end of the prompt."""
        prompt = self.prompts[request_id]
        if num_tokens >= prompt.tokens:
            num_tokens += prompt.compact_blocks * self.block_size
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)

    @override
    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Ours puts the compact blocks between the prompt blocks and the growth blocks.

        It also counts the request, when the end of its prompt is scheduled for the first time.
        """
        prompt = self.prompts[request_id]
        if num_tokens >= prompt.tokens:
            num_tokens += prompt.compact_blocks * self.block_size
            if not prompt.is_complete and not self.stats.knows(request_id):
                kept = prompt.layout.mean_kept(prompt.tokens)
                self.stats.complete(request_id, prompt.outcome, prompt.tokens, kept)
        return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)

    @override
    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Ours enters only the prompt blocks of a pruned request into the prefix cache.

        Tokens generated after pruning have other keys and values than a prefill would give.
        """
        if self.prompts[request.request_id].compact_blocks:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    @override
    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Ours frees the prompt blocks before the window, when the pruning step is processed."""
        prompt = self.prompts[request_id]
        if processed_computed_tokens >= prompt.tokens and not prompt.is_complete:
            prompt.is_complete = True
            self._remove_blocks_in_range(request_id, 0, prompt.freed_blocks)
            self.stats.free(request_id, prompt.freed_blocks, prompt.compact_blocks)

    @override
    def pop_blocks_for_free(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """Ours also forgets the request, which finished, was aborted or preempted."""
        self.prompts.pop(request_id, None)
        self.stats.release(request_id)
        return super().pop_blocks_for_free(request_id, *args, **kwargs)


def find_manager(kv_cache_manager: Any) -> SparseMMManager | None:
    """The manager of the pruned layers, if vLLM's has one."""
    managers = kv_cache_manager.coordinator.single_type_managers
    return next((m for m in managers if isinstance(m, SparseMMManager)), None)
