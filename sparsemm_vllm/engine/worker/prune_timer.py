"""How long the device spends on pruning, without waiting for it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PruneTimer:
    """Adds up time on the device; on the CPU, where work is done when a call returns, by the clock.

    On a GPU two events a layer enclose the kernels; they are read in a later step, when the device
    has passed them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[Any, Any]] = deque()
        self._spare: list[Any] = []
        self._seconds = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of what is launched inside."""
        if self._on_gpu:
            start, end = self._event(), self._event()
            start.record()
            yield
            end.record()
            self._pending.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def _event(self) -> Any:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)

    def take(self) -> float:
        """Seconds that are known by now and were not returned before."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._seconds += start.elapsed_time(end) / 1000
            self._spare += [start, end]
        seconds, self._seconds = self._seconds, 0.0
        return seconds
