"""Files that do not fit on the disk: one clear line, what was there stays, nothing half written."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from sparsemm_vllm.budget.profile import save_profile
from sparsemm_vllm.cli import app
from sparsemm_vllm.commands.demo import command as demo
from sparsemm_vllm.commands.evaluate.folder import EvalFolder
from sparsemm_vllm.commands.evaluate.report import save_json
from sparsemm_vllm.commands.figures import save_figure
from sparsemm_vllm.engine.vllm_api.contract import Contract
from sparsemm_vllm.profiler.attention import Scores
from sparsemm_vllm.profiler.partial import Partial, Run
from support.tiny import skewed_profile

ROOM = 600  # bytes; every file here is larger
BEFORE = "what was there"


@contextmanager
def little_room() -> Iterator[None]:
    """Files of this process can grow no further, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_partial(path: Path) -> None:
    run = Run("model", "hash", "free", "data", "hash", 3, 0)
    hits = np.random.default_rng(0).random((50, 4, 8), dtype=np.float32)
    Partial(path, run).save(Scores(hits, np.ones(50, np.int64)))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "head profile": lambda path: save_profile(skewed_profile(), path),
    "partial profile": save_partial,
    "figure": lambda path: save_figure(Figure(), path),
    "evaluation": lambda path: save_json(path, {"text": "x" * ROOM}, []),
    "record of vLLM": lambda path: Contract("0", {"symbol": "x" * ROOM}).save(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_changes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    path.write_text(BEFORE)
    with pytest.raises(OSError, match="File too large") as error, little_room():
        WRITERS[name](path)
    assert error.value.filename == str(path)
    assert path.read_text() == BEFORE
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_evaluation_that_could_not_begin_begins_later(tmp_path: Path) -> None:
    configuration = {"model": "x" * ROOM}
    with pytest.raises(OSError, match=r"configuration\.json"), little_room():
        EvalFolder(tmp_path / "out", configuration)
    EvalFolder(tmp_path / "out", configuration)


def refused(*words: Any) -> str:
    """The line that a command ends with."""
    with little_room():
        done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 2, done.exc_info
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_commands_say_which_file(tmp_path: Path) -> None:
    profile, scores = tmp_path / "profile.json", tmp_path / "scores.json"
    save_profile(skewed_profile(), profile)
    scores.write_text(json.dumps({f"{i}-{j}": [0.5, i + j] for i in range(8) for j in range(8)}))
    picture, made = tmp_path / "out.png", tmp_path / "made.json"
    commands = {
        picture: ("show", profile, "--out", picture),
        made: ("import-scores", scores, "--model-id", "m", "--out", made),
    }
    for file, words in commands.items():
        assert refused(*words) == f"sparsemm {words[0]}: {file}: File too large\n"
    assert sorted(tmp_path.iterdir()) == [profile, scores]


def test_the_demo_says_which_file(tmp_path: Path) -> None:
    said = refused("demo", "--out", tmp_path, "--seed", 1)
    assert said == f"sparsemm demo: {tmp_path / 'picture.png'}: File too large\n"
    assert not list(tmp_path.iterdir())


def test_the_demos_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome: Any = None
    sample: Any = Image.new("RGB", (8, 8))
    path = tmp_path / "report.json"
    path.write_text(BEFORE)
    with pytest.raises(OSError, match=r"report\.json"), little_room():
        demo._save({"pruned": False, "text": "x" * ROOM}, sample, outcome, tmp_path)
    assert path.read_text() == BEFORE
