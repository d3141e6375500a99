"""Python processes that tests start."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.paths import BENCHMARKS, TESTS

# As `pythonpath` in pyproject.toml: a child imports `support` and the benchmarks as tests do.
PYTHONPATH = {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, BENCHMARKS)))}


def python(
    *arguments: str | Path, environment: Mapping[str, str] = os.environ, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end and keep what it prints.

    Args:
        arguments: command line after `python`.
        environment: variables of the child, besides its path to `support` and the benchmarks.
        options: keyword arguments of `subprocess.run`.
    """
    command = [sys.executable, *map(str, arguments)]
    environment = {**environment, **PYTHONPATH}
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def compiling() -> dict[str, str]:
    """Environment in which Triton compiles, whatever the tests around do."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
