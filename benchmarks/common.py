"""What the benchmarks share."""

from collections.abc import Callable
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def timed(benchmark: Any, function: Callable[[], None], **model: float) -> None:
    """Time `function` until the device is done; `model` says what it has to move and compute."""

    def run() -> None:
        function()
        if GPU:
            torch.cuda.synchronize()

    benchmark.extra_info |= model | {"device": torch.cuda.get_device_name() if GPU else "CPU"}
    benchmark.pedantic(run, warmup_rounds=3, rounds=20)
