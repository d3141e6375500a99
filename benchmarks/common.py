"""What the benchmarks share. Needs the standard library only: a GPU machine may have no more."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
COMMIT = ROOT / ".gpu" / "commit"
Justify = Callable[[str, int], str]
TIME_IS_OVER = 3  # exit status: something is left to do, and no time


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description with its lines as they are."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=form)


# Tables


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table; none without rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines] if lines else []


def aligned(lines: Sequence[Sequence[str]], first: Justify, others: Justify) -> str:
    """Text in columns, two blanks apart.

    Args:
        lines: words of each line, as many in each.
        first: `str.ljust` or `str.rjust`, for the first column.
        others: alignment of the other columns, one of the two.
    """
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    justify = [first, *[others] * (len(columns) - 1)]
    placed = ([j(*at) for j, *at in zip(justify, line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(words).rstrip() for words in placed)


# Processes and files


def with_paths(*folders: Path, **variables: str) -> dict[str, str]:
    """This process's environment with folders in front of the module path, and other variables."""
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables


def kill(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that leads a group, and to what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


@contextlib.contextmanager
def files_of(out: Path, last: str = "") -> Iterator[Path]:
    """A scratch folder, whose files move into a folder one by one when the block ends.

    So whoever makes or reads the same folder meanwhile is not disturbed.

    Args:
        out: folder that gets the files; it is made.
        last: name of the file that moves last.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == last):
            file.chmod(0o644)
            os.replace(file, out / file.name)


def add_file(tar: tarfile.TarFile, name: str, content: bytes, mtime: int = 0) -> None:
    """Put a file into a tar, with nobody's name on it."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), mtime
    tar.addfile(entry, io.BytesIO(content))


# What was measured, and what measured it


def digest(*folders: Path) -> str:
    """Digest of the code in these folders, 12 hexadecimal digits."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def source_digest() -> str:
    """Digest of what is measured, and of what measures it."""
    return digest(*(ROOT / name for name in ("sparsemm_vllm", "triton_kernels", "benchmarks")))


def output(*command: str) -> str | None:
    """What a command says, run in the repository; None if there is no such command or it fails."""
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
        "driver": None if dry else output(*query),
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
    commit = output("git", "rev-parse", "HEAD")
    changed = output("git", "status", "--porcelain", "triton_kernels", "sparsemm_vllm")
    return {"commit": commit or "unknown", "changed": bool(changed)}
