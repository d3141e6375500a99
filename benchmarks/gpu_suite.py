"""Checks and measurements on a GPU, in parts that can be resumed.

    python benchmarks/gpu_suite.py --out build/gpu                  # every part
    python benchmarks/gpu_suite.py --out build/gpu --parts kernels  # needs neither vLLM nor a model
    python benchmarks/gpu_suite.py --out build/gpu --parts kernels --cases ^smoke
    python benchmarks/gpu_suite.py --out build/dry --dry-run        # the same on a CPU, tiny

* kernels: every launcher against its torch twin, and decoding in a CUDA graph;
* methods: what AdaKV and random do of their own, as on the CPU and without waiting for the GPU;
* bench: time of the kernels beside the time that their bytes take at the measured bandwidth;
* modes: a model of four layers gives the same tokens without graphs and in every graph mode;
* pair: dense and pruned 7B models in full size, with a bf16 and an fp8 cache: their
  log-probabilities and decode throughput;
* tune: bandwidth of decode variants;
* ncu: Nsight Compute's counters of two decode launches, where it is installed.

`gpu_run.sh` calls this for a machine that is there for minutes only.

A part runs in a process of its own for `--minutes` at most and saves every case. Called again, it
goes on where it stopped, repeats what failed, and skips what is done: ``<part>.json`` in the folder
says so, ``<part>.failed.txt`` why not. The last lines are a table and one JSON object. Exit status:
0 if all parts are done, 1 if a case failed, 3 if something is left to do.

Needs torch and triton; `modes` and `pair` need vLLM too, on the path. The package need not be
installed, nor typer, rich, matplotlib, hypothesis and pytest. Logs of engines lie in ``engines/``.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import HERE, ROOT, TIME_IS_OVER, digest, kill, machine, make_parser, with_paths

if TYPE_CHECKING:
    from gpu_parts.records import Record

PARTS = ("kernels", "methods", "bench", "modes", "pair", "tune", "ncu")
GRACE = 30  # seconds after its time in which a part may end by itself
RESTARTS = 3  # of a part that died; a GPU is useless to a process after an illegal access


def package_tree(folder: Path) -> Path:
    """The package as an installation would lay it out, with the entry points that vLLM looks for.

    It is a copy, so that no edit changes what a running suite measures. The repository's root must
    not be on the path: `triton_kernels` is another package's name.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    name, version = project["project"]["name"], project["project"]["version"]
    no_bytecode = shutil.ignore_patterns("__pycache__")
    places = project["tool"]["setuptools"]["package-dir"]
    for package in project["tool"]["setuptools"]["packages"]:
        path = package.replace(".", "/")  # a package's folder may hold others
        source = ROOT / places.get(package, path)
        shutil.copytree(source, folder / path, ignore=no_bytecode, dirs_exist_ok=True)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def record_of(args: argparse.Namespace, part: str) -> "Record":
    """What a part has found out so far."""
    from gpu_parts.records import Record  # needs the package, whose copy `main` puts on the path

    return Record(args.out, part, args.dry_run, args.source)


def error_text() -> str:
    """The exception that is handled, with paths from the repository's root on."""
    return traceback.format_exc().replace(f"{ROOT}{os.sep}", "")


def child(args: argparse.Namespace) -> int:
    """Run the cases of one part that are left to do."""
    from gpu_parts.device import Context, Device, imitate_gpu_machine

    start = time.monotonic()
    record = record_of(args, args.child)
    data = record.data
    try:
        if args.dry_run:
            imitate_gpu_machine()
        device = Device(args.dry_run)
        part = importlib.import_module(f"gpu_parts.{args.child}")
        deadline = start + args.seconds
        context = Context(device, args.out, deadline, data["cases"], data["failed"])
        cases = part.cases(context)
    except Exception:
        data["failed"]["the part itself"] = error_text()
        record.save()
        raise
    data |= {"total": len(cases), "machine": machine(args.dry_run)}
    data["names"] = list(cases)
    left = (name for name in cases if name not in data["cases"] and name not in data["failed"])
    todo = chosen(left, args.cases)
    todo.sort(key=data["earlier"].__contains__)
    run = CaseRunner(record, context, cases, part.NEEDS)
    if args.at_once == 1:  # in the main thread: the GPU's state is a thread's own
        finished = list(map(run, todo))
    else:
        with ThreadPoolExecutor(args.at_once) as pool:
            finished = list(pool.map(run, todo))
    return 0 if all(finished) else TIME_IS_OVER


def chosen(names: Iterable[str], pattern: str) -> list[str]:
    """The names in which the regular expression finds something."""
    return [name for name in names if re.search(pattern, name)]


class CaseRunner:
    """Runs a part's cases one by one and saves what each found, or why it failed."""

    def __init__(
        self,
        record: "Record",
        context: Any,
        cases: dict[str, Callable[[], dict[str, Any]]],
        needs: float,
    ) -> None:
        self.record, self.context, self.cases, self.needs = record, context, cases, needs
        self.begun = False
        self.lock = threading.Lock()

    def __call__(self, name: str) -> bool:
        """Run a case; False if there is no time left to begin it."""
        data, device = self.record.data, self.context.device
        with self.lock:
            if self.begun and self.context.left < self.needs:
                return False
            self.begun = True
            data["running"].append(name)
            self.record.save()
        start = time.monotonic()
        try:
            result = self.cases[name]()
            device.synchronize()
            found = {"cases": {name: result | {"seconds": round(time.monotonic() - start, 2)}}}
        except Exception:
            found = {"failed": {name: error_text()}}
            print(f"{self.record.part}: {name} failed\n{found['failed'][name]}", flush=True)
        with self.lock:
            for kind, entry in found.items():
                data[kind] |= entry
            data["running"].remove(name)
            self.record.save()
        print(f"{self.record.part}: {name}, {time.monotonic() - start:.1f} s", flush=True)
        device.synchronize()  # raises, and ends this process, if the GPU is lost to it
        device.free()
        return True


def run_part(part: str, args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Run a part's cases in processes of its own until they are done or its time is over."""
    record = record_of(args, part)
    if record.final.exists():
        other = "" if record.data["source"] == args.source else ", with other code"
        print(f"{part}: done before{other}", flush=True)
        return
    record.data["earlier"] = chosen(record.data["failed"], args.cases)
    for name in record.data["earlier"]:
        del record.data["failed"][name]
    record.save()
    start = time.monotonic()
    deadline = start + 60 * args.minutes
    for _ in range(1 + RESTARTS):
        seconds = deadline - time.monotonic()
        command = [sys.executable, __file__, "--out", str(args.out), "--child", part]
        command += ["--seconds", str(seconds), "--source", args.source]
        command += ["--cases", args.cases, "--at-once", str(args.at_once)]
        command += ["--dry-run"] if args.dry_run else []
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = process.wait(max(0, seconds) + GRACE)
            why = f"the process ended with status {code}"
        except subprocess.TimeoutExpired:
            code, why = None, f"stopped {GRACE} seconds after the end of the part's time"
        finally:
            kill(process)  # vLLM's engines too
            process.wait()
        record = record_of(args, part)
        if code in (0, TIME_IS_OVER):
            break
        names = record.data["running"] or ["the part itself"] * (not record.data["failed"])
        for name in names:
            record.data["failed"][name] = why
            print(f"{part}: {name}: {why}", flush=True)
        record.data["running"] = []
        record.save()
        if record.data["total"] is None or deadline - time.monotonic() < GRACE:
            break
    record.data["seconds"] = round(record.data["seconds"] + time.monotonic() - start, 1)
    record.finish()


def report(args: argparse.Namespace, called: list[str]) -> int:
    """Print what failed, the tables of all results so far and one JSON object; the exit status."""
    from gpu_report.summary import sections, skipped  # need the package

    overview: dict[str, Any] = {}
    found: dict[str, Any] = {}
    print("\n" + "=" * 100)
    for part in PARTS:
        record = record_of(args, part)
        data = record.data
        if record.status == "not begun" and (part not in called or args.report):
            continue
        cases = f"{len(data['cases'])} of {data['total']} cases"
        failed = f", {len(data['failed'])} failed" if data["failed"] else ""
        print(f"{part}: {record.status}, {cases}{failed}, {data['seconds']:.0f} s")
        for name, error in data["failed"].items():
            print(f"  FAILED {name}: {error.strip().splitlines()[-1][:200]}")
        found[part] = data
        overview[part] = {key: data.get(key) for key in ("total", "seconds", "machine", "source")}
        counts = {"cases": len(data["cases"]), "failed": list(data["failed"])}
        overview[part] |= {"status": record.status} | counts
    print("", *sections(found), sep="\n")
    for part, name, why in skipped(found):
        print(f"skipped: {part}, {name}: {why}")
    code = exit_status(args, called)
    print(json.dumps({"ok": code == 0, "parts": overview}))
    return code


def exit_status(args: argparse.Namespace, called: list[str]) -> int:
    """0 if all that was asked for is done, 1 if a case failed, else 3."""
    records = [record_of(args, part) for part in called]
    if any(record.status == "failed" for record in records):
        return 1
    return 0 if all(record.done(args.cases) for record in records) else TIME_IS_OVER


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=7, help="time of a part (%(default)s)")
    parser.add_argument("--cases", default="", help="of these names only: a regular expression")
    parser.add_argument("--at-once", type=int, default=1, help="cases side by side (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no table at the end")
    parser.add_argument("--report", action="store_true", help="print what there is, run nothing")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)

    called = args.parts.split(",")
    if unknown := set(called) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TIME_IS_OVER))  # ends the part's process too
    with tempfile.TemporaryDirectory() as folder:
        tree = package_tree(Path(folder))
        sys.path.insert(0, str(tree))
        args.source = digest(tree, HERE)
        if args.dry_run:
            import sparsemm_vllm

            sparsemm_vllm.use_cpu()
        environment = with_paths(tree)
        for part in called if not args.report else ():
            run_part(part, args, environment)
        return exit_status(args, called) if args.quiet else report(args, called)


if __name__ == "__main__":
    sys.exit(main())
