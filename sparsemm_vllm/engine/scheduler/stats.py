"""What became of each request, counted where it is decided: beside the scheduler.

Knows nothing of vLLM. The front end shows it: `metrics.py`.
"""

import time
from collections import Counter, deque
from collections.abc import Container
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

REMEMBERED = 32  # requests that the page shows


class Outcome(StrEnum):
    """Why a prompt was pruned or not."""

    PRUNED = "pruned"
    TOO_SHORT = "too_short"
    OPTED_OUT = "opted_out"
    POOL_AMPLE = "pool_ample"


@dataclass
class RequestRecord:
    """A request whose prompt has been scheduled to its end. Never holds what was asked.

    Attributes:
        request_id: id that vLLM gave the request.
        outcome: reason why its prompt was pruned or not.
        prompt_tokens: length `n` of its prompt.
        kept_tokens: prompt tokens that a KV head keeps on average, window included.
        completed: time at which the end of its prompt was scheduled, in seconds since 1970.
        finished: time at which it was found to have ended, in seconds since 1970; None until then.
    """

    request_id: str
    outcome: Outcome
    prompt_tokens: int
    kept_tokens: float
    completed: float
    finished: float | None = None


class RequestStats:
    """Counts since the last `drain`, and the requests that are alive."""

    def __init__(self) -> None:
        self._live: dict[str, RequestRecord] = {}
        self._recent: deque[RequestRecord] = deque(maxlen=REMEMBERED)
        self._recent_changed = False
        self._pruned: dict[str, tuple[int, int]] = {}
        self._freed_now = self._compact_now = 0
        self._counts: dict[str, Counter[str]] = {}
        self._freed_blocks = 0
        self._any_invalid = False
        self._reset()

    def _reset(self) -> None:
        self._counts = {name: Counter() for name in ("requests", "prompt_tokens", "kept_tokens")}
        self._freed_blocks = 0
        self._invalid_requests = 0
        self._recent_changed = False

    def knows(self, request_id: str) -> bool:
        """Whether the request was counted; one that is preempted and resumed counts once."""
        return request_id in self._live

    def complete(
        self, request_id: str, outcome: Outcome, prompt_tokens: int, kept_tokens: float
    ) -> None:
        """Count a request: the chunk that ends its prompt is scheduled."""
        record = RequestRecord(request_id, outcome, prompt_tokens, kept_tokens, time.time())
        self._live[request_id] = record
        self._recent.append(record)
        self._counts["requests"][outcome] += 1
        self._counts["prompt_tokens"][outcome] += prompt_tokens
        self._counts["kept_tokens"][outcome] += kept_tokens  # type: ignore[assignment]
        self._recent_changed = True

    def count_invalid(self) -> bool:
        """Count a request that asks for what cannot be; whether it is the first ever."""
        first, self._any_invalid = not self._any_invalid, True
        self._invalid_requests += 1
        return first

    def free(self, request_id: str, freed_blocks: int, compact_blocks: int) -> None:
        """Count the blocks that a pruned prompt gave back, once, however often this is called."""
        if request_id not in self._pruned:
            self._pruned[request_id] = (freed_blocks, compact_blocks)
            self._freed_now += freed_blocks
            self._compact_now += compact_blocks
            self._freed_blocks += freed_blocks

    def release(self, request_id: str) -> None:
        """A request gave all its blocks back: it ended, or it was preempted."""
        freed_blocks, compact_blocks = self._pruned.pop(request_id, (0, 0))
        self._freed_now -= freed_blocks
        self._compact_now -= compact_blocks

    def end_others(self, alive: Container[str]) -> None:
        """The requests that are not among these have ended."""
        ended = [request_id for request_id in self._live if request_id not in alive]
        for request_id in ended:
            self._live.pop(request_id).finished = time.time()
        self._recent_changed |= bool(ended)

    def drain(self, table_entries: int) -> dict[str, Any]:
        """The counts since the last call, and what is held now, as plain data.

        Args:
            table_entries: number of entries in all requests' block tables, freed ones included.

        Returns:
            `requests`, `prompt_tokens` and `kept_tokens` by outcome, `freed_blocks` and
            `invalid_requests`, since the last call; `held_blocks`, and `dense_blocks` that dense
            attention would hold, now, a block shared by two requests counted twice; the `recent`
            requests, the latest first, if they changed.
        """
        drained: dict[str, Any] = {name: dict(counts) for name, counts in self._counts.items()}
        drained["freed_blocks"] = self._freed_blocks
        drained["invalid_requests"] = self._invalid_requests
        drained["held_blocks"] = table_entries - self._freed_now
        drained["dense_blocks"] = table_entries - self._compact_now
        if self._recent_changed:
            requests = [asdict(record) for record in reversed(self._recent)]
            drained["recent"] = {"time": time.time(), "requests": requests}
        self._reset()
        return drained
