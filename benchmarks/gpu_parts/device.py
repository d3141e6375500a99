"""The GPU, or the CPU in its place."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from triton.runtime.interpreter import GridExecutor

Function = Callable[[], Any]
Cases = dict[str, Callable[[], dict[str, Any]]]  # of a part, by name

# What the GPU machine need not have; a dry run does without, to prove it.
ABSENT = ("typer", "rich", "matplotlib", "hypothesis", "pytest", "pandas", "datasets")


class Device:
    """What only CUDA has, and its equivalent in a dry run.

    Args:
        dry: whether the CPU stands for the GPU.

    Attributes:
        torch: device of the tensors.
        multiprocessors: number of multiprocessors.
        has_fp8: whether Triton converts e4m3 here.

    Raises:
        RuntimeError: if torch finds no GPU and the run is not dry.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        if not dry and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU; --dry-run needs none")
        self.torch = torch.device("cpu" if dry else "cuda")
        self.multiprocessors, self.has_fp8 = 2, True
        if not dry:
            known = torch.cuda.get_device_properties(self.torch)
            self.multiprocessors = known.multi_processor_count
            self.has_fp8 = (known.major, known.minor) >= (8, 9)

    def resident(self, launch: Function) -> int:
        """Programs of a kernel that run at once; `launch` returns what Triton compiled."""
        if self.dry:
            return 2 * self.multiprocessors
        from sparsemm_vllm.triton_kernels.occupancy import resident_programs

        return resident_programs(launch(), self.torch)

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def graph(self, function: Function) -> Function:
        """A replay of what `function` launches."""
        if self.dry:
            return function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def time(self, function: Function, repeats: int = 20) -> dict[str, float]:
        """Microseconds on the device: median, 20th and 80th percentile."""
        if self.dry:
            begin = time.perf_counter()
            function()
            times = 2 * [1e6 * (time.perf_counter() - begin)]
        else:
            function()
            events = [
                [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)
            ]
            for start, end in events:
                start.record()
                function()
                end.record()
            torch.cuda.synchronize()
            times = [1e3 * start.elapsed_time(end) for start, end in events]
        p20, *_, p80 = statistics.quantiles(times, n=5)
        return {"us": statistics.median(times), "us_20": p20, "us_80": p80}

    def kernels(self, function: Function) -> dict[str, list[float]]:
        """Microseconds of each kernel that `function` launches, by name, in their order."""
        if self.dry:
            return _interpreted_kernels(function)
        from torch.profiler import ProfilerActivity, profile

        function()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        on_device = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
        found: dict[str, list[float]] = {}
        for event in sorted(on_device, key=lambda event: event.time_range.start):
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
        return found

    def free(self) -> None:
        """Give back memory that no tensor holds."""
        if not self.dry:
            torch.cuda.empty_cache()


@dataclass
class Context:
    """What the cases of a part are told.

    Attributes:
        device: device that they run on.
        folder: folder for files that outlive a case.
        deadline: end of this call, by `time.monotonic`.
        results: results of the cases that passed, by name.
        failed: errors of the others, by name.
    """

    device: Device
    folder: Path
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def wait(self, name: str) -> dict[str, Any]:
        """The result of a case that may still run beside this one.

        Raises:
            RuntimeError: if there is none.
        """
        while name not in self.results and name not in self.failed and self.left > 0:
            time.sleep(0.2)
        if name not in self.results:
            raise RuntimeError(f"there is nothing to compare with: {name} failed or did not end")
        return self.results[name]

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def _interpreted_kernels(function: Function) -> dict[str, list[float]]:
    """`Device.kernels` of Triton's interpreter."""
    found: dict[str, list[float]] = {}
    run = GridExecutor.__call__

    def timed(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        run(executor, *args, **kwargs)
        found.setdefault(executor.fn.__name__, []).append(1e6 * (time.perf_counter() - begin))

    with mock.patch.object(GridExecutor, "__call__", timed):
        function()
    return found


def imitate_gpu_machine() -> None:
    """Hide what the GPU machine may lack, and repair products of bfloat16 in the interpreter."""
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails

    from kernel_cases import repair_bfloat16_products

    repair_bfloat16_products()
