"""The launches of `gpu_run.sh`, made on a machine without a GPU, where each ends after compiling.

The parts of the suite run as they are, in full size, on the CPU: `kernels` on real tensors, with
each kernel's torch twin in its place after it was compiled; `bench` and `tune` with caches that
have a shape and no memory. Engines do not run; what one compiles when it starts is compiled.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import timed_cases
import torch
from decode_model import VICUNA
from gpu_parts import bench, kernels, modes, pair, tune
from gpu_parts.device import Context, Device, Function
from timed_cases import Model, P

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.worker import warm_up as serving
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops

MULTIPROCESSORS = 132  # of an H100 and of an H200

Run = Callable[..., Any]


class Gpuless(Device):
    """The CPU with a GPU's sizes: times are made up, and what is to be captured runs once."""

    def __init__(self, multiprocessors: int) -> None:
        self.dry = False
        self.torch = torch.device("cpu")
        self.multiprocessors, self.has_fp8 = multiprocessors, True

    def resident(self, launch: Function) -> int:
        launch()
        return 2 * self.multiprocessors

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        pass

    def graph(self, function: Function) -> Function:
        function()
        return function

    def time(self, function: Function, repeats: int = 1) -> dict[str, float]:
        return {"us": 1.0, "us_20": 1.0, "us_80": 1.0}


def then_twin(launch: Run, twin: Run) -> Run:
    """Compile, and do on the CPU what the kernel would."""

    def both(*args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)
        twin(*args, **kwargs)

    return both


@contextmanager
def twins(*ops: str) -> Iterator[None]:
    """While it lasts, launchers of these kernels compute their results with torch."""
    with ExitStack() as stack:
        for name in ops:
            both = then_twin(getattr(triton_ops, name), getattr(torch_ops, name))
            stack.enter_context(mock.patch.object(triton_ops, name, both))
        yield


def without_memory(
    device: Device, model: Model, blocks: int, layout: str, dtype: torch.dtype
) -> torch.Tensor:
    """The shape and the strides of `timed_cases.make_cache`'s cache."""
    return timed_cases.empty_cache(model, blocks, layout, dtype, torch.device("meta"))


def checked(run: Run) -> None:
    """A case of `kernels`, whose kernels' results the twins compute."""
    with twins(*triton_ops.__all__):
        run()


def measured(run: Run) -> None:
    """A case of `bench` or `tune`; only a decode step's schedule is computed."""
    with mock.patch.object(timed_cases, "make_cache", without_memory), twins("schedule_decode"):
        run()


def engine(device: Device, model: Model, budget: int, length: int, fp8: bool, layout: str) -> None:
    """What an engine compiles when it starts.

    Args:
        device: device that stands for the GPU.
        model: model whose attention it is.
        budget: tokens that a head keeps on average.
        length: largest number of tokens of a request.
        fp8: whether the cache holds e4m3.
        layout: layout of the cache.
    """
    scores = timed_cases.head_scores(model)
    heads = CacheLayout.from_scores(scores, model.Hkv, budget, timed_cases.W)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    own = slice(0, model.L), slice(0, model.Hkv)
    sizes = Heads(model.L, model.Hq, model.Hkv, model.D, dtype)
    most = timed_cases.MOST_PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors
    requests = modes.REQUESTS
    state = SparseState(heads, own, sizes, Capacity(requests, length, most), device.torch)
    state.ops = triton_ops
    cache = without_memory(device, model, 1 << 10, layout, dtype)
    state.attach(PrunedCache(cache, {}))
    width = -(-length // P) + heads.most_compact_blocks(length, P)
    table = torch.zeros(requests, width, dtype=torch.int32)
    with mock.patch.object(serving, "resident_programs", return_value=most):  # it asks a GPU
        serving.warm_up(state, torch.bfloat16, table)


def engines(device: Device) -> dict[str, Run]:
    """The engines of `modes` and `pair` that the runs start."""
    kinds = [(modes.SMALL, modes.BUDGET, modes.LENGTH, False)]
    kinds += [(VICUNA, budget, pair.LENGTH, fp8) for budget, fp8 in pair.BUDGETS]
    return {
        f"engine {model.name} B={budget} {'fp8' if fp8 else 'bf16'} {layout}": partial(
            engine, device, model, budget, length, fp8, layout
        )
        for model, budget, length, fp8 in kinds
        for layout in kernels.LAYOUTS
    }


def cases() -> dict[str, Run]:
    """All launches, by name."""
    device = Gpuless(MULTIPROCESSORS)
    rates = {"bytes_per_second": 1e12, "flop_per_second": 1e15}
    known = {name: rates for name in ("copy bandwidth", "read bandwidth", "bf16 product")}
    context = Context(device, Path(), time.monotonic() + 1e6, known)
    found: dict[str, Run] = {}
    for name, run in kernels.cases(context).items():
        found[f"kernels {name}"] = partial(checked, run)
    found |= engines(device)
    for part in (bench, tune):
        for name, run in part.cases(context).items():
            if name not in known and not name.startswith("trace"):  # of a step that is compiled
                found[f"{part.__name__.rpartition('.')[2]} {name}"] = partial(measured, run)
    return found
