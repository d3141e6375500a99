"""What vLLM calls inside, seen by the names of its methods."""

from collections.abc import Callable
from typing import Any


class Watch:
    """Notes calls inside `schedule` and `update_from_output`.

    Attributes:
        allocated: names of the requests that got blocks for the step that is scheduled.
        lookups: prompt tokens that the prefix cache held when a request was looked up, by name.
    """

    def __init__(self, simulation):
        self.simulation = simulation
        self.scheduler, self.kv = simulation.scheduler, simulation.kv
        self.chats, self.steps, self.seen = simulation.chats, simulation.steps, simulation.seen
        self.allocated, self.lookups = set(), {}
        self._enter()

    def _enter(self):
        """Note calls inside `schedule` and `update_from_output`."""
        scheduler, kv = self.scheduler, self.kv

        def watch(holder: Any, name: str, note: Callable[..., None], before: bool = False) -> None:
            original = getattr(holder, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                if before:
                    note(*args)
                result = original(*args, **kwargs)
                if not before:
                    note(result, *args)
                return result

            setattr(holder, name, watched)

        watch(scheduler, "_preempt_request", self._on_preempt, before=True)
        watch(scheduler, "_reserve_prefill_lookahead", self._on_chunk)
        watch(kv, "allocate_slots", self._on_allocate)
        watch(kv, "get_computed_blocks", self._on_lookup, before=True)
        watch(scheduler, "update_from_output", self._on_update, before=True)
        watch(scheduler, "update_from_output", self._on_updated)

    def _on_preempt(self, request, *_):
        name = request.request_id
        in_its_step = name in self.allocated
        self.simulation.note("preempts", name, "scheduled in this step" if in_its_step else "")
        self.seen["preempted"] += 1
        self.seen["preempted in its own step"] += in_its_step
        self.seen["preempted in flight"] += self.simulation.in_flight(name)
        self.seen["preempted in its prompt"] += request.num_computed_tokens < self.chats[name].n
        self.seen["preempted in its prune step"] += self.simulation.is_in_prune_step(name)

    def _on_chunk(self, tokens, request, computed, asked, *_):
        self.seen["window did not fit"] += tokens == 0 < asked

    def _on_allocate(self, blocks, request, *_):
        if blocks is not None:
            self.allocated.add(request.request_id)

    def _on_lookup(self, request, *_):
        found = self.kv.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        self.lookups[request.request_id] = found[1]

    def _on_update(self, output, *_):
        assert output is self.steps[0].output, "steps are processed in their order"
        self.alive = set(self.scheduler.requests)
        for name in self.steps.popleft().reads:
            request = self.scheduler.requests.get(name)
            if request is not None and request.num_stale_output_tokens:
                what = "dropped" if request.drop_stale_output else "delivered"
                self.seen[f"outputs from before a preemption {what}"] += 1

    def _on_updated(self, _, output, *__):
        finished = self.alive - set(self.scheduler.requests)
        self.seen["finished in flight"] += sum(map(self.simulation.in_flight, finished))
        self.simulation.invariants.remember()
