"""Bandwidth of decode variants: programs on a multiprocessor, layouts, tiles, stages, warps."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from triton.runtime.errors import OutOfResources

from gpu_parts.bench import DRY, QWEN, TINY, VICUNA, Decode, Model, head_scores
from gpu_parts.device import Context

NEEDS = 20
LAYOUTS = ("LBHNC", "LBNHC")
# The module, which its function hides.
kernel = importlib.import_module("sparsemm_vllm.triton_kernels.sparse_decode")


def measure(
    context: Context, model: Model, layout: str, programs_each: int, **options: int
) -> dict[str, Any]:
    """Bytes a second of eight prompts' decode."""
    device = context.device
    usual = kernel.launch_options

    def launch_options(*args: Any) -> dict[str, int]:
        return usual(*args) | {k: v for k, v in options.items() if k != "block_n"}

    n, batch, budget, dtype = 8192, 8, 1024, None
    if device.dry:
        n, batch, budget, dtype = DRY.prompt, 2, 64, DRY.dtype
    setup = Decode(
        device,
        model,
        head_scores(model, context.scores),
        n,
        batch,
        budget,
        layout,
        programs_each=programs_each,
        block_n=options.get("block_n"),
        **({"dtype": dtype} if dtype else {}),
    )
    with mock.patch.object(kernel, "launch_options", launch_options):
        try:
            setup.layer(0)
        except OutOfResources as error:
            return {"bytes_per_second": 0.0, "balance": 0.0, "skipped": str(error)}
        time = device.time(device.graph(setup.step))
    rate = 1e6 * setup.bytes * model.L / time["us"]
    return time | {"bytes_per_second": rate, "balance": setup.balance()}


def cases(context: Context) -> dict[str, Callable[[], dict[str, Any]]]:
    """Programs in both layouts, then the launch options one by one."""
    dry = context.device.dry
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for model in (TINY,) if dry else (VICUNA, QWEN):
        for layout in LAYOUTS:
            variants: list[dict[str, int]] = [{"programs_each": each} for each in (1, 2, 3, 4)]
            variants += [{"programs_each": 2, "block_n": size} for size in (16, 32, 128)]
            variants += [{"programs_each": 2, "STAGES": stages} for stages in (2, 3, 4, 6)]
            variants += [{"programs_each": 2, "num_warps": warps} for warps in (2, 8)]
            for variant in variants[:1] + variants[4::3] if dry else variants:
                options = " ".join(f"{key}={value}" for key, value in variant.items())
                name = f"{model.name} {layout} {options}"
                found[name] = partial(measure, context, model, layout, **variant)
    return found


def summary(results: dict[str, Any]) -> list[str]:
    """Fastest first."""
    order = sorted(results, key=lambda name: -results[name]["bytes_per_second"])
    return [
        f"{name:44} {results[name]['bytes_per_second'] / 1e9:8.1f} GB/s,"
        f" balance {results[name]['balance']:.2f}"
        for name in sorted(order, key=lambda name: name.split()[0])
    ]
