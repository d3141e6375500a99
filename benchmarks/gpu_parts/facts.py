"""What the machine is and has, into a JSON file: ``python -m gpu_parts.facts FILE``."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpu_parts.records import machine

TOOLS = ("ncu", "compute-sanitizer", "cuobjdump", "nvcc", "gcc")


def said(*command: str) -> str | None:
    """A command's output, or None if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def facts() -> dict[str, Any]:
    """Hardware, versions, and the tools that are there."""
    from precompile import compiler_facts

    return {
        "machine": machine(dry=not torch.cuda.is_available()),
        "python": sys.version.split()[0],
        "nvidia_smi": said("nvidia-smi"),
        "clocks": said(
            "nvidia-smi",
            "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu",
            "--format=csv",
        ),
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        **compiler_facts(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(facts(), indent=1))
