"""Bandwidth of decode variants: tile, stages, registers and programs varied together."""

from collections.abc import Callable
from functools import partial
from typing import Any

from triton.runtime.errors import OutOfResources

from gpu_parts.bench import (
    DRY,
    QWEN,
    TINY,
    VICUNA,
    Decode,
    Step,
    Variant,
    head_scores,
    launched_as,
    sizes_of,
)
from gpu_parts.device import Context

NEEDS = 10

# What the multiprocessor has is shared: larger tiles and more stages leave room for fewer
# programs, and so do more registers. A point that says something is a whole of them.
VARIANTS = (
    Variant(128, 3, programs_each=2),
    Variant(64, 5, programs_each=2),
    Variant(128, 3, maxnreg=168, programs_each=3),
    Variant(64, 4, maxnreg=168, programs_each=3),
    Variant(128, 4, programs_each=1),
    Variant(64, 3, maxnreg=128, programs_each=4),
)
STEPS = (Step(VICUNA, 8, 256), Step(QWEN, 32, 256))
DRY_VARIANTS = (Variant(16, 2), Variant(32, 2, programs_each=1))
DRY_STEPS = (Step(TINY, 2, 64, n=DRY.steps[0].n),)


def measure(context: Context, step: Step, variant: Variant) -> dict[str, Any]:
    """Bytes a second of a decode step."""
    device = context.device
    with launched_as(variant):
        scores = head_scores(step.model, context.scores)
        setup = Decode(device, step, scores, sizes_of(context).dtype, variant)
        try:
            setup.layer(0)
        except OutOfResources as error:
            return {"bytes_per_second": 0.0, "balance": 0.0, "skipped": str(error)}
        time = device.time(device.graph(setup.step))
    rate = 1e6 * setup.bytes * step.model.L / time["us"]
    return time | {"bytes_per_second": rate, "balance": setup.balance()}


def cases(context: Context) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every variant of each step."""
    dry = context.device.dry
    return {
        f"{step.name.removeprefix('decode ')}: {describe(variant)}": partial(
            measure, context, step, variant
        )
        for step in (DRY_STEPS if dry else STEPS)
        for variant in (DRY_VARIANTS if dry else VARIANTS)
    }


def describe(variant: Variant) -> str:
    """Its name in the table."""
    return " ".join(f"{key}={value}" for key, value in vars(variant).items())


def summary(results: dict[str, Any]) -> list[str]:
    """Each step's variants, the fastest first."""
    order = sorted(results, key=lambda name: -results[name]["bytes_per_second"])
    return [
        f"{name:80} {results[name]['bytes_per_second'] / 1e9:8.1f} GB/s,"
        f" balance {results[name]['balance']:.2f}"
        for name in sorted(order, key=lambda name: name.partition(":")[0])
    ]
