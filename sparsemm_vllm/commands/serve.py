"""`sparsemm serve`: `vllm serve` in the environment that SPARSEMM needs."""

import os
import shutil
import sys
from pathlib import Path

from sparsemm_vllm.environment import CPU_VARIABLES, has_gpu


def vllm_command() -> str:
    """Path of the `vllm` program of this Python installation.

    Raises:
        FileNotFoundError: if vLLM is not installed.
    """
    return program("vllm", "vllm")


def program(name: str, package: str) -> str:
    """Path of a program of this Python installation.

    The program, not ``python -m``, which would put the working folder on the module path.

    Raises:
        FileNotFoundError: if the package that brings it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(
            f"the program {name} was not found; install it: pip install {package}"
        )
    return found


def serve_environment() -> dict[str, str]:
    """The environment of a server: unchanged where there is a GPU."""
    return dict(os.environ) if has_gpu() else {**os.environ, **CPU_VARIABLES}


def exec_serve(arguments: list[str]) -> None:
    """Become ``vllm serve *arguments``."""
    command = vllm_command()
    sys.stdout.flush()
    os.execve(command, [command, "serve", *arguments], serve_environment())
