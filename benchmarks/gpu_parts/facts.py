"""What the machine is and has, into a JSON file: ``python -m gpu_parts.facts FILE``."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from common import machine, output
from precompile import compiler_facts

TOOLS = ("ncu", "compute-sanitizer", "cuobjdump", "nvcc", "gcc")


def facts() -> dict[str, Any]:
    """Hardware, versions, and the tools that are there."""
    return {
        "machine": machine(dry=not torch.cuda.is_available()),
        "python": sys.version.split()[0],
        "nvidia_smi": output("nvidia-smi"),
        "clocks": output(
            "nvidia-smi",
            "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu",
            "--format=csv",
        ),
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        **compiler_facts(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(facts(), indent=1))
