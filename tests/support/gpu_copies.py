"""A copy of the repository to break, for tests of the GPU suite; and processes that must end."""

import shutil
from pathlib import Path

from support.paths import ROOT


def copy(folder: Path) -> Path:
    """A repository to break."""
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in ("benchmarks", "sparsemm_vllm", "triton_kernels", "head_profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def has_ended(process: int) -> bool:
    """Whether a process is gone, or dead and not yet waited for."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
