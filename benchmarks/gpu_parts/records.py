"""What a part has found out so far, on disk after every case. Needs the standard library only."""

import hashlib
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMIT = ROOT / ".gpu" / "commit"


class Record:
    """``<part>.partial.json`` while the part runs, ``<part>.json`` when every case has passed.

    Attributes:
        data: ``source``, a digest of the code, ``names`` of all cases, ``cases`` that passed, by
            name, those that ``failed`` in this call with their errors, those that failed
            ``earlier``, those that are ``running``, the machine, and the seconds of all calls.
    """

    def __init__(self, folder: Path, part: str, dry: bool, code: str) -> None:
        self.part = part
        self.final = folder / f"{part}.json"
        self.partial = folder / f"{part}.partial.json"
        self.failures = folder / f"{part}.failed.txt"
        self.data: dict[str, Any] = {"part": part, "dry_run": dry, "source": code}
        self.data |= {"seconds": 0.0, "total": None, "names": [], "running": []}
        self.data |= {"cases": {}, "failed": {}, "earlier": []}
        for path in (self.final, self.partial):
            if not path.exists():
                continue
            found = json.loads(path.read_text())
            if found["dry_run"] != dry:
                raise SystemExit(f"{path} is of another kind of run; give another --out")
            if path == self.final or found["source"] == code:
                self.data = found  # half a part of other code counts for nothing
                break

    @property
    def complete(self) -> bool:
        """Whether every case has passed."""
        return self.data["total"] is not None and len(self.data["cases"]) == self.data["total"]

    def done(self, pattern: str) -> bool:
        """Whether every case has passed in whose name the regular expression finds something."""
        asked = [name for name in self.data["names"] if re.search(pattern, name)]
        return bool(asked) and all(name in self.data["cases"] for name in asked)

    def save(self) -> None:
        """Write what there is, at once or not at all."""
        part = self.partial.with_suffix(".tmp")
        part.write_text(json.dumps(self.data, indent=1))
        part.replace(self.partial)

    def finish(self) -> None:
        """Write the failures, or the final file."""
        self.failures.unlink(missing_ok=True)
        self.save()
        if self.data["failed"]:
            errors = (f"== {name}\n{error}\n" for name, error in self.data["failed"].items())
            self.failures.write_text("\n".join(errors))
        elif self.complete:
            self.partial.replace(self.final)

    @property
    def status(self) -> str:
        """In one word."""
        if self.data["failed"]:
            return "failed"
        if self.complete:
            return "done"
        return "unfinished" if self.partial.exists() else "not begun"


def digest(*folders: Path) -> str:
    """Of the code in these folders."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def source_digest() -> str:
    """Digest of what is measured, and of what measures it."""
    return digest(*(ROOT / name for name in ("sparsemm_vllm", "triton_kernels", "benchmarks")))


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(dry: bool) -> dict[str, Any]:
    """Hardware, versions and commit."""
    import torch

    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": "CPU" if dry else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "driver": None if dry else _output(*query),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in ("triton", "vllm", "transformers")},
        **code_version(),
    }


def code_version() -> dict[str, Any]:
    """The commit and whether the code was changed since: ``.gpu/commit``'s word, or git's.

    ``gpu_run.sh prepare`` writes the file, with a digest of the code. A copy of the working tree
    has no history, or one that ends before its changes. The file counts while the code is as it
    says.
    """
    if COMMIT.exists():
        prepared = json.loads(COMMIT.read_text())
        if prepared.pop("source", None) == source_digest():
            return prepared
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "triton_kernels", "sparsemm_vllm")
    return {"commit": commit or "unknown", "changed": bool(changed)}
