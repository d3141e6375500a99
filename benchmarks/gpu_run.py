"""Every figure from a GPU machine that is there for minutes, what says most first.

    sh benchmarks/gpu_run.sh prepare BUNDLE   # here: fills .gpu with what travels
    sh benchmarks/gpu_run.sh 1                # there, 330 s: correctness, the kernels' figures
    sh benchmarks/gpu_run.sh 2                # there, 270 s: dense and pruned models, graph modes
    sh benchmarks/gpu_run.sh 1 --dry-run      # the same jobs, tiny, on a CPU

A run is a plan of jobs. A job begins when those before it have ended, beside others where that
disturbs no timing, and is killed at its deadline; the next ones run all the same. If the very first
case of the kernels fails, compute-sanitizer looks at it for the rest of the time.

``results.tar.gz`` in the folder of the results is written anew after each job: records of the parts
(``<part>.json``, see `gpu_suite.py`), ``jobs.json``, ``facts.json``, the logs, and the kernels that
Triton compiled. What is printed is a line for each job and one table: at most 12,000 characters.

Needs the standard library only; what the jobs need, `gpu_suite.py` says.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import HERE, ROOT, add_file, code_version, kill, make_parser, source_digest, with_paths
from gpu_plans import FIRST_CASE, GPU, RUNS, STARTED_FIRST, Job, Places, some_jobs
from precompile import ARCHIVE, archived_kernels

CHARACTERS = 12_000  # of the output: more is not read back
PACKED_BYTES = 15 << 20  # of the tar
LOG_BYTES = 1 << 20  # the end of each log
TRAVELS_BYTES = 64 << 20  # the tree and .gpu
REPORT_SECONDS = 12  # for the table
MOST_LINES = 20  # of a log, in the output
GRACE = 3  # seconds between asking a job to end and making it
SLOW = 6  # a dry run's deadlines are as many times later


@dataclass
class Run:
    """Jobs that run, and what became of them.

    Attributes:
        jobs: jobs of the plan.
        places: folders of the run.
        dry: whether deadlines are those of a CPU.
        seconds: time of the whole run, in seconds.
        start: time at which it began, by `time.monotonic`.
        ended: status of each job that ended, by name: ``ok``, or why not.
        times: seconds after the start at which each began and ended, by name.
        running: processes of the jobs that run, by name.
        asked: times at which jobs were asked to end, in seconds after the start, by name.
        printed: number of characters that were printed.
    """

    jobs: list[Job]
    places: Places
    dry: bool
    seconds: float
    start: float = field(default_factory=time.monotonic)
    ended: dict[str, str] = field(default_factory=dict)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)
    printed: int = 0

    @property
    def now(self) -> float:
        """Seconds after the start."""
        return time.monotonic() - self.start

    def deadline(self, job: Job) -> float:
        """Seconds after the start at which a job is killed."""
        return job.until * (SLOW if self.dry else 1)

    def say(self, text: str) -> None:
        """Print, and count what was printed."""
        self.printed += len(text) + 1
        print(text, flush=True)

    def go(self) -> None:
        """Run the jobs until all have ended."""
        try:
            while len(self.ended) < len(self.jobs):
                for job in self.jobs:
                    self.step(job)
                time.sleep(0.1)
        finally:
            for process in self.running.values():
                kill(process)

    def step(self, job: Job) -> None:
        """Begin, watch or end a job."""
        if job.name in self.ended:
            return
        process = self.running.get(job.name)
        if process is None:
            if why := self.reason_to_skip(job):
                self.end(job, f"skipped: {why}")
            elif self.may_begin(job):
                self.begin(job)
        elif (code := process.poll()) is not None:
            kill(process)  # what it left running
            del self.running[job.name]
            status = "ok" if code == 0 else f"ended with status {code}"
            late = job.name in self.asked
            self.end(job, f"killed after {self.deadline(job):.0f} s" if late else status)
        elif job.name in self.asked:
            if self.now > self.asked[job.name] + GRACE:
                kill(process)
        elif self.now > self.deadline(job):
            self.asked[job.name] = self.now
            kill(process, signal.SIGTERM)

    def may_begin(self, job: Job) -> bool:
        """Whether all that comes before has ended."""
        return all(name in self.ended for name in (*job.after, *job.needs))

    def reason_to_skip(self, job: Job) -> str | None:
        """Why a job will not run, if that is known."""
        broken = self.broken()
        if job.if_broken and broken is False:
            return "the first case passed"
        if not job.if_broken and broken:
            return "the kernels' first case failed"
        for name in job.needs:
            if self.ended.get(name, "ok") != "ok":
                return f"{name} {self.ended[name]}"
        if not self.may_begin(job):
            return None
        if self.now > self.deadline(job):
            return "no time left"
        return None if shutil.which(job.command[0]) else f"there is no {job.command[0]}"

    def kernels(self) -> dict[str, list[str]]:
        """Names in the kernels' record: all ``names`` and those of the ``cases`` that passed."""
        for path in (self.places.work / "kernels.json", self.places.work / "kernels.partial.json"):
            if path.exists():
                record = json.loads(path.read_text())
                return {key: list(record[key]) for key in ("names", "cases")}
        return {"names": [], "cases": []}

    def broken(self) -> bool | None:
        """Whether the kernels' first case has failed; None before that is known."""
        if STARTED_FIRST not in {job.name for job in self.jobs}:
            return False
        if STARTED_FIRST not in self.ended:
            return None
        record = self.kernels()
        return record["names"][:1] != record["cases"][:1] or not record["names"]

    def begin(self, job: Job) -> None:
        """Start a job, with vLLM on its path if that is installed."""
        environment, bundle = with_paths(HERE), self.places.bundle
        if self.ended.get("bundle") == "ok" and bundle.is_dir():
            binaries = f"{bundle / 'bin'}{os.pathsep}{environment['PATH']}"
            environment = with_paths(bundle, HERE, PATH=binaries)
        first = "^" + "|^".join(map(re.escape, self.kernels()["names"][:1] or ["smoke"])) + "$"
        command = [first if part == FIRST_CASE else part for part in job.command]
        if str(HERE / "gpu_suite.py") in command:
            command += ["--minutes", f"{(self.deadline(job) - self.now) / 60:.3f}"]
        self.times[job.name] = (self.now, self.now)
        with self.log(job.name).open("wb") as log:
            self.running[job.name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def log(self, name: str) -> Path:
        """Where a job's output goes."""
        folder = self.places.work / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name.replace(' ', '-')}.log"

    def end(self, job: Job, status: str) -> None:
        """Note what became of a job and save all results so far."""
        begin, _ = self.times.get(job.name, (self.now, self.now))
        self.times[job.name] = (begin, self.now)
        self.ended[job.name] = status
        self.say(f"{begin:5.0f} s .. {self.now:4.0f} s  {job.name}: {status}"[:160])
        self.save()

    def save(self) -> None:
        """Write the jobs' record, and the tar anew."""
        jobs = {
            name: {"status": status, "begin": self.times[name][0], "end": self.times[name][1]}
            for name, status in self.ended.items()
        }
        document = {"dry_run": self.dry, "seconds": self.now, "jobs": jobs, **code_version()}
        (self.places.work / "jobs.json").write_text(json.dumps(document, indent=1))
        pack(self.places)

    def report(self) -> None:
        """Print the table, within what may be printed in all."""
        lines = [f"\nafter {self.now:.0f} s: {self.places.tar.name}, {mebibytes(self.places.tar)}"]
        lines += self.machine()
        lines += self.said("cache")
        compiled = sum(path.suffix == ".cubin" for path in compiled_kernels())
        lines.append(f"cache: {compiled} kernels were compiled here")
        lines += self.said("sanitizer", "=========")  # compute-sanitizer's own lines
        if self.ended.get("check_gpu", "ok") != "ok":
            lines += self.said("check_gpu")
        command = [sys.executable, str(HERE / "gpu_suite.py"), "--out", str(self.places.work)]
        command += ["--report", *(["--dry-run"] if self.dry else [])]
        left = max(1.0, self.seconds * (SLOW if self.dry else 1) - self.now)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            lines += done.stdout.splitlines()[:-1]  # the last one is for programs
            lines += done.stderr.splitlines()[-5:] if done.returncode not in (0, 1, 3) else []
        except subprocess.TimeoutExpired:
            lines.append("no time left for the table; python benchmarks/gpu_suite.py --report")
        self.say(clip(lines, CHARACTERS - self.printed - 100))

    def said(self, job: str, begin: str = "") -> list[str]:
        """The first lines of a job's log that begin like this; none if it did not run."""
        if not self.log(job).exists():
            return []
        lines = self.log(job).read_text(errors="replace").splitlines()
        return [f"{job}: {line}" for line in lines if line.startswith(begin)][:MOST_LINES]

    def machine(self) -> list[str]:
        """What was measured on, in a line."""
        path = self.places.work / "facts.json"
        if not path.exists():
            return ["no facts of the machine"]
        facts = json.loads(path.read_text())["machine"]
        return [", ".join(f"{key} {value}" for key, value in facts.items())]


def mebibytes(*paths: Path) -> str:
    """Size of files in words."""
    return f"{sum(path.stat().st_size for path in paths) / (1 << 20):.1f} MiB"


def clip(lines: list[str], characters: int) -> str:
    """The first lines, as many as fit, and how many are left."""
    lines = [line[:240] for line in lines]
    used = 0
    for i, line in enumerate(lines):
        used += len(line) + 1
        if used > characters:
            return "\n".join([*lines[:i], f"... {len(lines) - i} more lines: --report"])
    return "\n".join(lines)


def pack(places: Places) -> None:
    """Write all results into one tar, at once or not at all; records first, then what has room."""
    part, now = places.tar.with_suffix(".tmp"), int(time.time())
    with part.open("wb") as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as tar:
        for name, content in results(places.work):
            add_file(tar, name, content, now)
        left_out = 0
        for path in compiled_kernels():
            if file.tell() > PACKED_BYTES:
                left_out += 1
            else:
                name = f"triton/{path.parent.name}/{path.name}"
                add_file(tar, name, path.read_bytes(), now)
        if left_out:
            add_file(tar, "left-out.txt", f"{left_out} files of Triton's cache".encode(), now)
    part.replace(places.tar)


def results(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Files of a run by name: what programs read first, then logs, of which the end counts."""
    kinds = (".json", ".result", ".job", ".txt", ".log", ".csv")
    paths = [path for path in folder.rglob("*") if path.suffix in kinds and path.is_file()]
    for path in sorted(paths, key=lambda path: (kinds.index(path.suffix), path)):
        yield str(path.relative_to(folder)), path.read_bytes()[-LOG_BYTES:]


def compiled_kernels() -> Iterator[Path]:
    """Files in Triton's cache that did not come with it and that a later run can use."""
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    known = archived_kernels(GPU / ARCHIVE)
    for path in sorted(cache.glob("*/*")):
        if path.suffix in (".json", ".cubin", ".so") and path.parent.name not in known:
            yield path


def prepare(bundle: Path, wheels: list[Path], results: list[Path]) -> int:
    """Fill ``.gpu``: the bundle's parts and scripts, Triton's cache, and the commit.

    Args:
        bundle: folder of the parts and scripts.
        wheels: Triton's wheels or folders of them; downloaded if not given.
        results: tars of earlier runs, for what Triton compiled there.
    """
    shutil.rmtree(GPU, ignore_errors=True)
    GPU.mkdir()
    wanted = [*bundle.glob("bundle.*"), bundle / "install_bundle.sh", bundle / "check_gpu.py"]
    for path in wanted:
        shutil.copy(path, GPU)
    prepared = code_version() | {"source": source_digest()}
    (GPU / "commit").write_text(json.dumps(prepared))
    command = [sys.executable, str(HERE / "precompile.py"), "build"]
    command += ["--triton", *map(str, wheels), "--add", *map(str, results)]
    if code := subprocess.run(command).returncode:
        return code
    return check_sizes()


def check_sizes() -> int:
    """Print what travels; 1 if it is too large."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tree = [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]
    carried = [path for path in GPU.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in (*tree, *carried))
    print(f"tree {mebibytes(*tree)}, .gpu {mebibytes(*carried)}, of {TRAVELS_BYTES >> 20} MiB")
    if total > TRAVELS_BYTES:
        print("too much: make the bundle with --sm90-only, or leave something out")
    return int(total > TRAVELS_BYTES)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("run", choices=[*RUNS, "prepare"])
    understood = "a folder of parts that install_bundle.sh understands, with that script and "
    parser.add_argument("bundle", nargs="?", type=Path, help=f"{understood}check_gpu.py")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--jobs", help="these only, separated by commas")
    parser.add_argument("--out", type=Path, help="folder of the tar; $OUT, or build/gpu-run")
    parser.add_argument("--triton", type=Path, nargs="*", default=[], help="wheels, to prepare")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="tars, to prepare")
    args = parser.parse_args()
    if args.run == "prepare":
        if args.bundle is None:
            parser.error("prepare needs the bundle's folder")
        return prepare(args.bundle, args.triton, args.add)
    out = args.out or Path(os.environ.get("OUT") or ROOT / "build" / "gpu-run")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    with tempfile.TemporaryDirectory(prefix="sparsemm-gpu-run-") as folder:
        places = Places(out.resolve(), Path(folder, "work"), Path(folder, "bundle"))
        places.work.mkdir()
        plan, seconds = RUNS[args.run]
        jobs = plan(places, args.dry_run)
        if args.jobs:
            names = set(args.jobs.split(","))
            if unknown := names - {job.name for job in jobs}:
                parser.error(f"unknown jobs: {', '.join(sorted(unknown))}")
            jobs = some_jobs(jobs, names)
        run = Run(jobs, places, args.dry_run, seconds)
        run.go()
        run.report()
    well = all(
        status == "ok" or status.startswith("skipped: the first case passed")
        for status in run.ended.values()
    )
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
