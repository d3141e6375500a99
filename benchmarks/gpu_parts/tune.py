"""Bandwidth of decode variants: tile, stages, registers and programs varied together."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from decode_model import QWEN, VICUNA
from timed_cases import TINY, Step
from triton.runtime.errors import OutOfResources

from gpu_parts.bench import DRY, Predicted, sizes_of
from gpu_parts.device import Cases, Context
from sparsemm_vllm.triton_kernels.tile_sizes import DecodeOptions, decode_options

NEEDS = 6


@dataclass(frozen=True)
class Variant:
    """How a decode step is launched.

    Attributes:
        options: options that the kernel is compiled with.
        programs_each: programs of a multiprocessor; as many as it runs at once if None.
    """

    options: DecodeOptions
    programs_each: int | None = None

    @property
    def name(self) -> str:
        """For the table."""
        options = self.options
        parts = [f"tile {options.block_n}, {options.stages} stages, {options.num_warps} warps"]
        parts += [f"{options.maxnreg} registers"] if options.maxnreg < 255 else []
        parts += ["pdl"] if options.pdl else []
        parts += ["lists pages"] if options.lists_pages else []
        parts += [f"{self.programs_each} programs"] if self.programs_each else []
        return ", ".join(parts)


SERVED = decode_options(128, torch.bfloat16, torch.bfloat16, block_m=16)

# What the multiprocessor has is shared: larger tiles and more stages leave room for fewer
# programs, and so do more registers. A point that says something is a whole of them.
VARIANTS = (
    Variant(SERVED),
    Variant(replace(SERVED, pdl=True)),
    Variant(replace(SERVED, lists_pages=True)),
    Variant(DecodeOptions(128, 3, 4)),
    Variant(DecodeOptions(64, 3, 4, maxnreg=168)),
    Variant(DecodeOptions(64, 4, 4)),
    Variant(DecodeOptions(128, 2, 4, maxnreg=168)),
    Variant(replace(SERVED, pdl=True, lists_pages=True)),
    Variant(DecodeOptions(128, 3, 4), programs_each=1),
    Variant(DecodeOptions(64, 3, 4, maxnreg=128)),
)
STEPS = (Step(VICUNA, 8, 256), Step(QWEN, 32, 256))
DRY_VARIANTS = (
    Variant(DecodeOptions(16, 2, 4)),
    Variant(DecodeOptions(32, 2, 4, lists_pages=True), programs_each=1),
)
DRY_STEPS = (Step(TINY, 2, 64, n=DRY.steps[0].n),)


def measure(context: Context, step: Step, variant: Variant) -> dict[str, Any]:
    """Bytes a second of a decode step."""
    device = context.device
    try:
        dtype = sizes_of(context).dtype
        setup = Predicted(device, step, dtype, variant.options, variant.programs_each)
        setup.layer(0)
    except OutOfResources as error:
        return {"bytes_per_second": 0.0, "balance": 0.0, "programs": 0, "skipped": str(error)}
    time = device.time(device.graph(setup.step))
    rate = 1e6 * setup.bytes * step.model.L / time["us"]
    balance, _ = setup.balance()
    return time | {
        "bytes_per_second": rate,
        "balance": balance,
        "programs": setup.rows.programs,
    }


def cases(context: Context) -> Cases:
    """Every variant of each step; those that say most of both first."""
    dry = context.device.dry
    return {
        f"{step.name.removeprefix('decode ')}: {variant.name}": partial(
            measure, context, step, variant
        )
        for variant in (DRY_VARIANTS if dry else VARIANTS)
        for step in (DRY_STEPS if dry else STEPS)
    }
