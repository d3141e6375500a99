"""Programs of this installation, and processes that end with all their children."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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


class LoggedProcess:
    """A program that starts on entering and stops on leaving, whatever happened in between.

    Args:
        command: program and its arguments.
        log: file for its output; its folder is made.
        environment: all variables of the program's environment.
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
        process: process that was started with ``start_new_session``.
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
