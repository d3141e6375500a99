"""Starts the process that checks, watches it, and prints what it found."""

import errno
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sparsemm_vllm.commands.check.cases import names
from sparsemm_vllm.commands.check.results import Line, Row
from sparsemm_vllm.environment import check_environment, has_gpu
from sparsemm_vllm.files import write_whole
from sparsemm_vllm.processes import LoggedProcess, ended_by_signals

SECONDS = 300.0  # of each engine, until it counts as hung
LOG_LINES = 12  # of the log, shown after a failure
# Without -P the working folder would be on the module path.
CHILD = (sys.executable, "-P", "-m", "sparsemm_vllm.commands.check.run_child")
PACKAGES = ("sparsemm-vllm", "vllm", "torch", "triton", "transformers")
STYLES = {"ok": "green", "differs": "red", "failed": "red", "not run": "yellow"}
END = "engine end"


class CheckRun(LoggedProcess):
    """The process that checks. Starts on entering, is ended on leaving.

    Args:
        seconds: time that it has for each engine, in seconds.
        command: program that does the work, for `run_child.main`'s arguments.

    Attributes:
        device: name of what the engine runs on.
        problem: sentence on what is wrong with the process; none if nothing is.
        seconds: time that it took, in seconds, once it has ended.
    """

    def __init__(self, seconds: float = SECONDS, command: Sequence[str] = CHILD) -> None:
        self.device = "GPU" if has_gpu() else "CPU"
        self.seconds = 0.0
        self._dtypes = ["bfloat16", "float32"] if has_gpu() else ["float32"]
        self._expected = names(self._dtypes)
        self._limit = seconds * len(self._dtypes)
        self._rows: dict[str, Row] = {}
        self._begun = ""
        self.problem: str | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="check-")
        self._results = Path(self._folder.name) / "results"
        self._read = 0  # bytes of the results
        descriptor, log = tempfile.mkstemp(prefix="sparsemm-check-", suffix=".log")
        os.close(descriptor)
        arguments = [self._folder.name, str(self._results), ",".join(self._dtypes)]
        arguments.append(f"{max(1.0, self._limit - 5):.0f}")  # then the log gets a stack trace
        super().__init__([*command, *arguments], Path(log), check_environment())

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        return super().__enter__()

    def stop(self, patience: float = 8.0) -> None:
        """End the process; of what it made, only its log stays."""
        super().stop(patience)
        self._folder.cleanup()

    def follow(self, console: Console) -> list[Row]:
        """Wait for the end, with a progress bar on a terminal.

        Args:
            console: terminal to draw on.

        Returns:
            All rows that a run must have; those that the process did not report, with the reason.
        """
        columns = BarColumn(24), TimeElapsedColumn(), TextColumn("{task.fields[row]}")
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            bar = progress.add_task("check", total=len(self._expected), row="")
            code = None
            while code is None and self.problem is None:
                code = self.code  # before reading: the last lines are read too
                self._read_results()
                progress.update(bar, completed=len(self._rows), row=self._begun)
                if code is None and time.monotonic() - self._started > self._limit:
                    self.problem = f"no end after {self._limit:.0f} s"
                time.sleep(0.1)
        self.seconds = time.monotonic() - self._started
        if code and self.problem is None:
            self.problem = f"its process ended with code {code}"
        return self._all_rows()

    def _read_results(self) -> None:
        if not self._results.exists():
            return
        with self._results.open("rb") as file:
            file.seek(self._read)
            complete = file.read().rpartition(b"\n")[0]
        if complete:
            self._read += len(complete) + 1
            for text in complete.split(b"\n"):
                self._take(text)

    def _take(self, text: bytes) -> None:
        """Take in one line of the results."""
        try:
            line = Line.model_validate_json(text)
        except ValidationError:
            self.problem = f"its process wrote what is no result: {text[:60]!r}"
            return
        self.device = line.device or self.device
        self._begun = line.begins or self._begun
        if (row := line.row) is not None:
            if row.name not in self._expected or row.name in self._rows:
                self.problem = f"its process wrote a result that nothing asked for: {row.name}"
            else:
                self._rows[row.name] = row

    def _all_rows(self) -> list[Row]:
        rows = [self._rows.get(name) or Row(name=name, status="not run") for name in self._expected]
        missing = [row.name for row in rows if row.status == "not run"]
        if self.problem is None and missing and all(row.status != "failed" for row in rows):
            self.problem = "its process ended too early"
        if self.problem is None:
            return rows
        at = self._begun if self._begun in missing else next(iter(missing), END)
        failed = Row(name=at, status="failed", finding=self.problem)
        return [failed if row.name == at else row for row in rows] + [failed] * (at == END)


def check_folder(file: Path) -> None:
    """Refuse a file that could not be written, before a minute of work.

    Raises:
        OSError: naming the file, if its folder does not exist.
    """
    if not file.parent.is_dir():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))


def run_check(
    console: Console, list_differences: Callable[[], int], record: Path | None, run: CheckRun
) -> int:
    """Print what differs in vLLM while the engine starts, then what the engine answers.

    Args:
        console: terminal to print on.
        list_differences: function that prints what differs in vLLM, and returns its exit status.
        record: file for the result as JSON.
        run: process that checks, not yet started.

    Returns:
        The exit status: 0 if nothing differs and all rows are ok, 1 if not, 130 after Ctrl-C.
    """
    where = "the GPU" if has_gpu() else "the CPU: about a minute"
    console.print(f"Comparing vLLM with the one that was tested, and serving with it on {where}.")
    try:
        with ended_by_signals(), run:
            different = list_differences()
            rows = run.follow(console)
            passed = all(row.status == "ok" for row in rows)
            print_rows(rows, console)
            if passed:
                run.log.unlink()
            else:
                if run.problem is not None:
                    console.print(Text(f"The log ends with:\n{run.last_lines(LOG_LINES)}", "dim"))
                console.print(f"The whole log: {run.log}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        run.log.unlink(missing_ok=True)
        console.print("\nInterrupted; the engine is stopped.")
        return 130
    document = make_record(rows, run, passed)
    print_end(document, console)
    if record is not None:
        write_whole(record, json.dumps(document, indent=1) + "\n")
    return different or int(not passed)


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the table of all rows."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("served", no_wrap=True)
    table.add_column("tokens", justify="right")
    table.add_column("largest\ndiff.", justify="right")
    table.add_column("KV blocks", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for row in rows:
        table.add_row(
            Text(row.status, STYLES[row.status]),
            Text(row.name),
            "" if row.tokens is None else str(row.tokens),
            "" if row.difference is None else f"{row.difference:.1e}",
            Text(row.blocks),
            Text(row.finding),
        )
    console.print(table)


def make_record(rows: Sequence[Row], run: CheckRun, passed: bool) -> dict[str, Any]:
    """What `--json` writes.

    Args:
        rows: rows of the table, all of them.
        run: process that made them.
        passed: whether all are as they should be.
    """
    versions = {package: _version(package) for package in PACKAGES}
    return {
        "versions": versions | {"python": platform.python_version()},
        "device": run.device,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(run.seconds, 1),
        "rows": [row.model_dump() for row in rows],
        "passed": passed,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def print_end(document: dict[str, Any], console: Console) -> None:
    """Print the versions, the time and the result."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    console.print(f"{versions}; {document['device']}; {document['seconds']:.0f} s", highlight=False)
    wrong = sum(row["status"] != "ok" for row in document["rows"])
    if document["passed"]:
        console.print("[green]pass[/]")
    else:
        console.print(f"[red]{wrong} of {len(document['rows'])} rows did not pass[/]")
