"""Nsight Compute's counters of one decode launch.

``python -m gpu_parts.ncu INDEX LAYERS`` makes the launches that it looks at.
"""

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import HERE, with_paths
from timed_cases import Decode, Step

from gpu_parts.bench import DRY_STEPS, STEPS, sizes_of
from gpu_parts.device import Cases, Context, Device, imitate_gpu_machine

NEEDS = 8
SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis")
KERNEL = "sparse_decode"
DENSE_LAYERS = 2  # all dense layers are alike, and their cache is large


def look(context: Context, index: int) -> dict[str, Any]:
    """Counters of a layer in the middle of a decode step; none where there is no ncu."""
    step = steps(context.device)[index]
    layers = step.model.L if step.budget else DENSE_LAYERS
    launches = [sys.executable, "-P", "-m", "gpu_parts.ncu", str(index), str(layers)]
    launches += ["dry"] if context.device.dry else []
    output = context.folder / f"ncu-{index}.csv"
    command = ["ncu", "--clock-control", "none", "--target-processes", "all"]
    command += ["--csv", "--log-file", str(output)]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["--kernel-name", f"regex:{KERNEL}", "--launch-count", "1"]
    command += ["--launch-skip", str(layers // 2)]
    there = shutil.which("ncu") is not None
    done = subprocess.run(
        [*command, *launches] if there else launches,
        env=with_paths(HERE),
        capture_output=True,
        text=True,
        timeout=max(1.0, context.left),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    if not there:
        return {"skipped": "there is no ncu"}
    counters = read_counters(output.read_text().splitlines())
    assert counters, f"ncu found no kernel: {output.read_text()[-1000:]}"
    return {"counters": counters}


def read_counters(lines: Iterable[str]) -> dict[str, str]:
    """Values with their units, by name, of ncu's CSV; what it says besides is left out."""
    rows = csv.DictReader(line for line in lines if line.startswith('"'))
    return {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in rows
        if row["Metric Name"]
    }


def steps(device: Device) -> list[Step]:
    """A pruned step and a dense one."""
    return list(DRY_STEPS[:2] if device.dry else STEPS[:2])


def cases(context: Context) -> Cases:
    """One for each step."""
    names = (step.name for step in steps(context.device))
    return {name: partial(look, context, i) for i, name in enumerate(names)}


def main(index: int, layers: int, dry: bool) -> None:
    """Launch a step's layers."""
    if dry:
        import sparsemm_vllm

        sparsemm_vllm.use_cpu()
        imitate_gpu_machine()
    device = Device(dry)
    step = steps(device)[index]
    step = replace(step, model=replace(step.model, L=layers))
    dtype = sizes_of(Context(device, Path(), 0)).dtype
    Decode(device, step, dtype).step()
    device.synchronize()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "dry" in sys.argv[3:])
