"""Points measured one after the other, each engine in a process of its own."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from sparsemm_vllm.commands.evaluate.engine import Job, Result
from sparsemm_vllm.commands.evaluate.errors import EvalError
from sparsemm_vllm.commands.evaluate.folder import EvalFolder
from sparsemm_vllm.commands.evaluate.points import Point
from sparsemm_vllm.files import write_whole
from sparsemm_vllm.processes import end_group, serve_environment

OFFLINE_ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
_ERROR = re.compile(r"^(?:\[\w+\]: )?[\w.]*(?:Error|Exception|Interrupt): (.+)")


def measure(
    points: Iterable[Point],
    job_of: Callable[[Point], Job],
    folder: EvalFolder,
    on_point: Callable[[Point, bool], None] = lambda point, done: None,
    on_answer: Callable[[int], None] = lambda answered: None,
) -> dict[Point, Result]:
    """Results of all points: those that the folder has, and what is measured now.

    Args:
        points: points to measure, all different.
        job_of: function that says what to do for a point.
        folder: folder that keeps the results.
        on_point: function to call with each point, and whether it was measured before.
        on_answer: function to call with the number of questions that the point has answered.

    Raises:
        EvalError: if an engine fails; what is done is kept.
    """
    results = {}
    for point in points:
        job = job_of(point)
        done = folder.load(point, job.settings)
        on_point(point, done is not None)
        if done is None:
            run_job(job, folder.log(point), on_answer)
            done = folder.load(point, job.settings)
            assert done is not None
        results[point] = done
    return results


def run_job(job: Job, log: Path, on_answer: Callable[[int], None]) -> None:
    """Do a job in a process of its own.

    Raises:
        EvalError: if it fails, with the error that its log ends with.
    """
    file = job.result.with_suffix(".job")
    write_whole(file, job.model_dump_json())
    with log.open("wb") as output:
        process = subprocess.Popen(
            # Without -P the working folder would be on the module path.
            [sys.executable, "-P", "-m", "sparsemm_vllm.commands.evaluate.engine", str(file)],
            env=serve_environment() | OFFLINE_ENGINE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,  # Ctrl-C is ours to handle
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            on_answer(int(line))
        code = process.wait()
    finally:
        end_group(process)
        file.unlink(missing_ok=True)
    if code:
        raise EvalError(f"{_last_error(log)} (exit code {code}; the whole log: {log})")


def _last_error(log: Path) -> str:
    """The message of the last exception in a log, or its last line."""
    lines = log.read_text(errors="replace").splitlines() or ["the engine's process ended"]
    found = [match[1] for line in lines if (match := _ERROR.match(line))]
    return (found or lines)[-1].strip()
