"""Processes with a beginning, an end and a log: `vllm serve`, and others."""

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from sparsemm_vllm.processes import LoggedProcess, serve_environment, vllm_command

HOST = "127.0.0.1"
READY = "the server answers"
# What vLLM's log says while it starts, and what that means.
STAGES = (
    ("non-default args", "vLLM is imported"),
    ("Initializing a V1 LLM engine", "the engine process runs"),
    ("Loading model from scratch", "the worker runs"),
    ("Model loading took", "the model is loaded"),
    ("KV cache size", "the KV cache is allocated"),
    ("Starting vLLM server", "the engine is ready"),
    ("", READY),
)


class ServerError(RuntimeError):
    """The server died or did not start in time; the message ends with the last lines of its log."""


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server(LoggedProcess):
    """A `vllm serve` process.

    Args:
        model: name or folder of the model.
        arguments: arguments of `vllm serve`, without host and port.
        log: file for its output.
        environment: variables to set beside those that SPARSEMM needs.
    """

    def __init__(
        self,
        model: str,
        arguments: Sequence[str],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        command = [vllm_command(), "serve", model, "--host", HOST, "--port", str(self.port)]
        super().__init__([*command, *arguments], log, serve_environment() | (environment or {}))

    def check_alive(self, patience: float = 0.0) -> None:
        """Raise `ServerError` if the process has ended, or does within `patience` seconds."""
        deadline = time.monotonic() + patience
        while self.code is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if (code := self.code) is not None:
            raise ServerError(f"the server ended with code {code}:\n{self.last_lines()}")

    def wait_until_ready(
        self, timeout: float = 600.0, on_stage: Callable[[int, str], None] | None = None
    ) -> None:
        """Wait until the server answers.

        Args:
            timeout: longest time to wait, in seconds.
            on_stage: function to call with the number of stages reached, of `STAGES`, and the
                meaning of the last one.

        Raises:
            ServerError: if it dies, or is not ready in time.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive()
            if on_stage is not None:
                on_stage(*self._stage())
            if self._answers():
                if on_stage is not None:
                    on_stage(len(STAGES), READY)
                return
            time.sleep(0.2)
        raise ServerError(f"the server was not ready after {timeout:.0f} s:\n{self.last_lines()}")

    def _stage(self) -> tuple[int, str]:
        text = self.log.read_text(errors="replace")
        reached = [i for i, (sign, _) in enumerate(STAGES) if sign and sign in text]
        return (reached[-1] + 1, STAGES[reached[-1]][1]) if reached else (0, "Python starts")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=1.0).is_success
        except httpx.TransportError:
            return False
