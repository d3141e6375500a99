"""Records of a GPU run: read from a tar or a folder, checked, merged, and kept by day and device.

A record is what a part of the suite wrote (``<part>.json``, or ``<part>.partial.json`` if the part
was not finished). Runs of one day add up: a later run's case takes the place of an earlier one's;
what failed stays on the list.
"""

import json
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from speed.results import results_folder

from sparsemm_vllm.files import write_json

# Folders of the machine in an error's text, before what says something elsewhere too.
FOLDERS = re.compile(r"/(?:[\w.+-]+/)*(?=(?:site-packages|bundle|vllm_dist_\w+)\b)")

PARTIAL = ".partial"
# Facts without which a figure says nothing; the others are versions of what a part may not need.
DRY_FACTS = ("device", "torch", "triton", "commit")
FACTS = (*DRY_FACTS, "driver", "cuda")


class ArchiveError(ValueError):
    """Results that cannot be taken."""


@dataclass
class Run:
    """Records of one tar or folder.

    Attributes:
        name: name of the tar or folder.
        day: day of the newest record, in UTC.
        parts: records by part.
        notes: lines that a reader must know: jobs that were killed, files that are damaged.
    """

    name: str
    day: date
    parts: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> Run:
    """Records of a tar, compressed or not, or of a folder.

    Args:
        path: file or folder.

    Raises:
        ArchiveError: if there are none, or one has figures and does not say what measured them.
    """
    run = Run(path.name, date.min, {})
    documents = []
    for name, seconds, content in _json_files(path):
        try:
            document = json.loads(content)
        except ValueError:
            run.notes.append(f"{path.name}: {name} is damaged")
            continue
        if not isinstance(document, dict):
            continue
        if name.name == "jobs.json":
            run.notes += _jobs(path.name, document)
        if {"part", "cases", "failed", "dry_run"} <= document.keys():
            documents.append((name, seconds, document))
    if not documents:
        raise ArchiveError(f"{path}: no record of a part of gpu_suite.py")
    run.day = datetime.fromtimestamp(max(seconds for _, seconds, _ in documents), UTC).date()
    depth = min(len(name.parts) for name, *_ in documents)
    facts = [d["machine"] for _, _, d in documents if d.get("machine")]
    for name, _, document in documents:
        part = "-".join([*name.parts[depth - 1 : -1], document["part"]])  # sanitizer/kernels.json
        complete = not name.stem.endswith(PARTIAL)
        if part in run.parts and not complete:  # left over from before it was finished
            continue
        run.parts[part] = _record(part, document, complete, facts, path)
    return run


def _json_files(path: Path) -> Iterator[tuple[PurePosixPath, float, bytes]]:
    """Name, time of change and content of each JSON file; finished parts before unfinished."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = path
        if not path.is_dir():
            folder = Path(scratch)
            try:
                with tarfile.open(path) as tar:
                    tar.extractall(folder, filter="data")
            except (OSError, tarfile.TarError) as error:
                raise ArchiveError(f"{path}: {error}") from error
        found = ((f, PurePosixPath(f.relative_to(folder))) for f in folder.rglob("*.json"))
        for file, name in sorted(found, key=lambda each: (each[1].stem.endswith(PARTIAL), each[1])):
            if file.is_file():
                yield name, file.stat().st_mtime, file.read_bytes()


def _jobs(run: str, document: dict[str, Any]) -> list[str]:
    """Jobs of `gpu_run.py` that did not end well, or had no need to begin."""
    return [
        f"{run}: job {name}: {job['status']}"
        for name, job in document.get("jobs", {}).items()
        if job.get("status", "ok") != "ok"
    ]


def _record(
    part: str, document: dict[str, Any], complete: bool, facts: list[Any], path: Path
) -> dict[str, Any]:
    """A record as it is kept: every case and failure with the commit that it is of."""
    machine = document.get("machine") or (facts[0] if facts and not document["cases"] else {})
    needed = DRY_FACTS if document["dry_run"] else FACTS
    missing = [fact for fact in needed if machine.get(fact) in (None, "", "unknown")]
    if missing:
        raise ArchiveError(f"{path}: {part} does not say its {', '.join(missing)}")
    commit = machine["commit"]
    names = document.get("names") or [*document["cases"], *document["failed"]]
    return {
        "part": part,
        "dry_run": document["dry_run"],
        "complete": complete,
        "total": document.get("total"),
        "names": names,
        "machines": [machine],
        "cases": {
            n: _without_answers(c) | {"commit": commit} for n, c in document["cases"].items()
        },
        "failed": [
            {"case": name, "error": FOLDERS.sub("", error), "commit": commit}
            for name, error in document["failed"].items()
        ],
        "notes": [],
    }


def _without_answers(case: dict[str, Any]) -> dict[str, Any]:
    """A case without the tokens that engines answered, which stay in the tar."""
    if "rounds" not in case:
        return case
    rounds = [
        {k: v for k, v in each.items() if k != "answers"}
        | {"requests": len(each.get("answers", ())) or each.get("requests")}
        for each in case["rounds"]
    ]
    return case | {"rounds": rounds}


def merge(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Records of one part, earlier ones first, as one."""
    first, *others = records
    merged = json.loads(json.dumps(first))
    for record in others:
        merged["cases"] |= record["cases"]
        merged["failed"] += [each for each in record["failed"] if each not in merged["failed"]]
        merged["names"] = list(dict.fromkeys([*merged["names"], *record["names"]]))
        merged["machines"] += [m for m in record["machines"] if m not in merged["machines"]]
        merged["complete"] = merged["complete"] or record["complete"]
        merged["total"] = max(filter(None, (merged["total"], record["total"])), default=None)
    merged["complete"] = merged["complete"] or len(merged["cases"]) == merged["total"]
    return merged


def keep(runs: list[Run], root: Path, dry: bool) -> dict[Path, dict[str, dict[str, Any]]]:
    """Merge runs, and what is there already, into the folders of their devices and days.

    Args:
        runs: runs that were read, earlier ones first.
        root: folder of all results.
        dry: whether they are of dry runs, which are kept apart.

    Returns:
        Records by part, by folder.

    Raises:
        ArchiveError: if a run is dry and `dry` is not said, or the other way round.
    """
    advice = "a GPU measured it: leave out --dry-run"
    if not dry:
        advice = "a dry run measures nothing; --dry-run takes it, apart from the others"
    for run in runs:
        if any(record["dry_run"] != dry for record in run.parts.values()):
            raise ArchiveError(f"{run.name}: {advice}")
    devices = {record["machines"][0]["device"] for run in runs for record in run.parts.values()}
    kept = {}
    for device in sorted(devices):
        own = [(run, part, r) for run in runs for part, r in run.parts.items()]
        own = [each for each in own if each[2]["machines"][0]["device"] == device]
        day = max(run.day for run, *_ in own)
        folder = results_folder(f"dry-run {device}" if dry else device, day, root)
        parts = load(folder)
        for run, part, record in own:
            parts[part] = merge([parts[part], record] if part in parts else [record])
            parts[part]["notes"] = list(dict.fromkeys([*parts[part]["notes"], *run.notes]))
        folder.mkdir(parents=True, exist_ok=True)
        for part, record in parts.items():
            write_json(folder / f"{part}.json", record)
        kept[folder] = parts
    return kept


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Records that are kept in a folder by part; it may hold other benchmarks' results too."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        document = json.loads(file.read_text())
        if isinstance(document, dict) and {"part", "cases", "machines"} <= document.keys():
            found[document["part"]] = document
    return found


def newest(root: Path) -> dict[Path, dict[str, dict[str, Any]]]:
    """Records of each GPU's newest day, by folder; dry runs are none."""
    found = {}
    for day in sorted(root.glob("*/*/")):
        parts = {
            part: record
            for part, record in load(day).items()
            if not record["dry_run"] and record["machines"][0]["device"] != "CPU"
        }
        if parts:
            found[day.parent] = day, parts  # a later day takes the place of an earlier one
    return dict(found.values())
