"""A program that stands for `sparsemm profile`, and engines that ask for a profile."""

import errno
import json
import sys
from pathlib import Path
from typing import Any

# Stands for `sparsemm profile`: writes the profile beside it, and a line for each time it runs.
STAND_IN = """#!{python}
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
with (here / "runs").open("a") as runs:
    print(*sys.argv[1:], file=runs)
(here / "environment").write_text(json.dumps(dict(os.environ)))
print("profiling", end="\\r", flush=True)
time.sleep({seconds})
while {wait_for!r} and not (here / {wait_for!r}).exists():
    time.sleep(0.1)
{fail}
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_bytes((here / "made.json").read_bytes())
print("profile ready")
"""
FAIL = "print('\\x1b[31mno room\\x1b[0m for the model'); sys.exit(3)"


class Program:
    """The stand-in, and what became of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sparsemm"
        self.write()

    def write(self, fail: str = "", seconds: float = 0, wait_for: str = "") -> None:
        """How it runs: how long, until which file is beside it, and how it fails."""
        text = STAND_IN.format(python=sys.executable, fail=fail, seconds=seconds, wait_for=wait_for)
        self.path.write_text(text)
        self.path.chmod(0o755)

    @property
    def runs(self) -> list[str]:
        file = self.path.parent / "runs"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the last run."""
        return json.loads((self.path.parent / "environment").read_text())


def engine_args(model: Path, profile: Any = "auto", **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    defaults: dict[str, Any] = {
        "attention_backend": "SPARSEMM",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "dtype": "float32",
        "additional_config": {"sparsemm": {"profile": profile}},
    }
    return EngineArgs(model=str(model), **(defaults | options))


def build(model: Path, profile: Any = "auto", **options: Any) -> Any:
    """The setting that reaches the engine."""
    config = engine_args(model, profile, **options).create_engine_config()
    return config.additional_config["sparsemm"]["profile"]


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
