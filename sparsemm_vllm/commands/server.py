"""Processes with a beginning, an end and a log: `vllm serve`, and others."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from sparsemm_vllm.serve import serve_environment, vllm_command

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


class LoggedProcess:
    """A program that starts on entering and stops on leaving, whatever happened in between.

    Args:
        command: program and its arguments.
        log: file for its output; its folder is made.
        environment: all of its variables.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to handle, and one signal reaches them all
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id while it runs; other processes may be its children."""
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code; none while it runs."""
        assert self._process is not None
        return self._process.poll()

    def last_lines(self, count: int = 20) -> str:
        """The end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-count:])

    def stop(self, patience: float = 8.0) -> None:
        """End the program and all its processes; `patience` seconds later they are killed."""
        if self._process is not None:
            end_group(self._process, patience)
            self._process = None


class Server(LoggedProcess):
    """A `vllm serve` process.

    Args:
        model: path or name.
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
            timeout: in seconds.
            on_stage: called with the number of stages reached, of `STAGES`, and the last one's
                meaning.

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


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that what it started is stopped."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_group(process: subprocess.Popen[bytes], patience: float = 8.0) -> None:
    """End a process that leads a group, and the group: vLLM's engines are processes of their own.

    Args:
        process: started with ``start_new_session``.
        patience: seconds until it is killed.
    """
    for sign, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        if _ends_within(process, seconds):
            break
    process.wait()


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the whole process group is gone in time; reaps its leader."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
