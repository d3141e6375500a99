"""The jobs of `gpu_run.py`: what runs when, beside what, and until when.

Needs the standard library only.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from common import HERE, ROOT

GPU = ROOT / ".gpu"  # not in version control: what travels beside the tree
STARTED_FIRST = "smoke"  # the job whose first case decides


@dataclass(frozen=True)
class Job:
    """A command with a deadline.

    Attributes:
        name: name of the job, and of its log.
        command: program and its arguments.
        until: time at which it is killed, in seconds after the run's start.
        after: names of the jobs that end before it begins.
        needs: names of the jobs that succeed before it begins.
        if_broken: whether it runs only if the kernels' first case fails; else only if it passes,
            or is not known yet.
    """

    name: str
    command: tuple[str, ...]
    until: float
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    if_broken: bool = False


@dataclass(frozen=True)
class Places:
    """Folders of a run.

    Attributes:
        out: folder of what outlives the machine.
        work: folder of the results while they are made.
        bundle: folder of vLLM, once it is installed.
    """

    out: Path
    work: Path
    bundle: Path

    @property
    def tar(self) -> Path:
        """The one file that comes back."""
        return self.out / "results.tar.gz"


def suite(
    places: Places, dry: bool, parts: str, cases: str = "", at_once: int = 1
) -> tuple[str, ...]:
    """Cases of the suite's parts."""
    command = [sys.executable, str(HERE / "gpu_suite.py"), "--out", str(places.work), "--quiet"]
    command += ["--parts", parts, "--cases", cases, "--at-once", str(at_once)]
    return (*command, "--dry-run") if dry else tuple(command)


def preparations(places: Places, dry: bool) -> list[Job]:
    """What both runs begin with: facts, Triton's cache, vLLM in the background, a first look."""
    python = sys.executable
    bundle = ("sh", str(GPU / "install_bundle.sh"), str(GPU), str(places.bundle))
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--target-processes", "all")
    again = Places(places.out, places.work / "sanitizer", places.bundle)
    first = suite(again, dry, "kernels", FIRST_CASE)
    return [
        Job("facts", (python, "-P", "-m", "gpu_parts.facts", str(places.work / "facts.json")), 40),
        Job("cache", (python, str(HERE / "precompile.py"), "unpack"), 20),
        Job("bundle", ("true",) if dry else bundle, 110),
        Job(STARTED_FIRST, suite(places, dry, "kernels", "^smoke"), 80, after=("cache",)),
        Job("sanitizer", sanitizer + first, 250, after=(STARTED_FIRST,), if_broken=True),
    ]


FIRST_CASE = "FIRST_CASE"  # stands for its name, which the kernels' record tells


def first_run(places: Places, dry: bool) -> list[Job]:
    """Correctness, with engines beside the kernels; then timings, alone on the GPU."""
    dtype = "float32" if dry else "bfloat16"
    engines = suite(places, dry, "modes", f"^{dtype} (eager|full)$", at_once=2)
    check = ("true",) if dry else (sys.executable, str(GPU / "check_gpu.py"))
    timings = suite(places, dry, "bench", "^(?!prune)")
    return [
        *preparations(places, dry),
        Job("check_gpu", check, 130, after=(STARTED_FIRST,), needs=("bundle",)),
        Job("engines", engines, 175, after=(STARTED_FIRST,), needs=("bundle",)),
        Job("kernels", suite(places, dry, "kernels"), 150, after=(STARTED_FIRST,)),
        Job("methods", suite(places, dry, "methods"), 155, after=("kernels",)),
        Job("timings", timings, 240, after=("facts", "check_gpu", "engines", "methods")),
        Job("tune", suite(places, dry, "tune"), 267, after=("timings",)),
        Job("prunes", suite(places, dry, "bench", "^prune"), 285, after=("tune",)),
        Job("ncu", suite(places, dry, "ncu"), 316, after=("prunes",)),
    ]


def second_run(places: Places, dry: bool) -> list[Job]:
    """Models one after the other, each alone on the GPU, then what is only compared.

    Dense and pruned come first: a run that ends early has the pair.
    """
    dtype = "float32" if dry else "bfloat16"
    modes = "eager|full" if dry else "eager|piecewise|both"

    def pair(name: str, case: str, until: float, *after: str) -> Job:
        command = suite(places, dry, "pair", f"^{case}$")
        return Job(f"pair {name}", command, until, after, needs=("bundle",))

    engines = suite(places, dry, "modes", f"^{dtype} ({modes})$", at_once=3)
    return [
        *preparations(places, dry),
        pair("dense", "dense", 125, "facts", STARTED_FIRST),
        pair("pruned", "pruned", 165, "pair dense"),
        pair("fp8", "dense fp8", 200, "pair pruned"),
        Job("modes", engines, 256, after=("pair fp8",), needs=("bundle",)),
        pair("equal", "budget over prompt", 256, "pair fp8"),
        pair("pruned fp8", "pruned fp8", 256, "modes", "pair equal"),
    ]


def some_jobs(plan: list[Job], names: set[str]) -> list[Job]:
    """These jobs of a plan, in its order: each waits for all of them that come before it."""
    before: dict[str, set[str]] = {}
    for job in plan:
        direct = {*job.after, *job.needs}
        before[job.name] = direct.union(*(before[name] for name in direct))
    return [
        replace(
            job,
            after=tuple(before[job.name] & names),
            needs=tuple(name for name in job.needs if name in names),
        )
        for job in plan
        if job.name in names
    ]


RUNS = {"1": (first_run, 330), "2": (second_run, 270)}
