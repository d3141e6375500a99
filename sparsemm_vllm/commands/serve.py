"""`sparsemm serve`: `vllm serve` in the environment that SPARSEMM needs."""

import os
import sys

from sparsemm_vllm.processes import serve_environment, vllm_command


def exec_serve(arguments: list[str]) -> None:
    """Become ``vllm serve *arguments``."""
    command = vllm_command()
    sys.stdout.flush()
    os.execve(command, [command, "serve", *arguments], serve_environment())
