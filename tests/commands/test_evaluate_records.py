import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sparsemm_vllm.commands.evaluate.engine import Result, TaskResult
from sparsemm_vllm.commands.evaluate.errors import EvalError
from sparsemm_vllm.commands.evaluate.figure import draw_records
from sparsemm_vllm.commands.evaluate.folder import EvalFolder
from sparsemm_vllm.commands.evaluate.points import Point
from sparsemm_vllm.commands.evaluate.records import (
    Record,
    ablation,
    bytes_that_keep,
    curves,
    dense_record,
    make_records,
)
from sparsemm_vllm.commands.evaluate.report import print_records, save_json

TRUTHS = {"ocr": [f"AB{i} CD{i} EF{i} GH{i}" for i in range(40)]}
HELD = {None: 16_000, 32: 4_000, 64: 8_000}


def result(share: float, budget: int | None, seed: int = 0) -> Result:
    """Answers with about this share of the words right."""
    right = np.random.default_rng(seed).random((40, 4)) < share
    answers = [
        " ".join(word if keep else "X" for word, keep in zip(truth.split(), row, strict=True))
        for truth, row in zip(TRUTHS["ocr"], right, strict=True)
    ]
    task = TaskResult(
        answers=answers,
        prompt_tokens=[200] * 40,
        answer_tokens=[9] * 40,
        held_bytes=[HELD[budget]] * 40,
        kept_tokens=[float(budget or 200)] * 40,
    )
    settings = {"budget": budget}
    return Result(
        settings=settings, tasks={"ocr": task}, block_size=16, block_bytes=1000, pool_blocks=9,
        seconds=1.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[Point, Result]:
    found = {Point("full"): result(1.0, None)}
    for method, shares in {"sparsemm": (0.8, 1.0), "snapkv": (0.3, 0.7)}.items():
        for budget, share in zip((32, 64), shares, strict=True):
            found[Point(method, budget)] = result(share, budget)
    found[Point("full", mask="visual", heads=((0, 1), (2, 3)))] = result(0.2, None)
    for draw, share in enumerate((0.95, 0.85)):
        point = Point("full", mask="random", draw=draw, heads=((1, draw), (2, 2)))
        found[point] = result(share, None, seed=draw)
    return found


@pytest.fixture(scope="module")
def records(results: dict[Point, Result]) -> list[Record]:
    return make_records(TRUTHS, results)


def test_records(records: list[Record]) -> None:
    by_name = {(record.curve, record.budget): record for record in records}
    assert len(by_name) == len(records) == 7  # random draws are one
    dense = by_name["full", None]
    assert dense.exact_words.value == dense.anls.value == 1
    assert dense.change["exact_words"].low == dense.change["exact_words"].high == 0
    snapkv = by_name["snapkv", 32]
    assert snapkv.exact_words.low < snapkv.exact_words.value < snapkv.exact_words.high < 0.5
    assert snapkv.change["exact_words"].value == pytest.approx(snapkv.exact_words.value - 1)
    assert (snapkv.held_bytes, snapkv.kept_tokens, snapkv.pictures) == (4000, 32, 40)
    random = by_name["random heads masked", None]
    assert (random.engines, random.masked_heads) == (2, 2)


def test_differences_are_paired(results: dict[Point, Result]) -> None:
    """A point that is wrong where dense is wrong differs by nothing, with certainty."""
    half = result(0.5, None)
    found = make_records(TRUTHS, {Point("full"): half, Point("snapkv", 32): half})
    assert found[1].exact_words.low < found[1].exact_words.high
    assert found[1].change["exact_words"].low == found[1].change["exact_words"].high == 0


def test_random_heads_are_a_mean_over_draws(
    results: dict[Point, Result], records: list[Record]
) -> None:
    single = [
        make_records(TRUTHS, {Point("full"): results[Point("full")], point: found})[-1]
        for point, found in results.items()
        if point.mask == "random"
    ]
    values = [record.exact_words.value for record in single]
    assert values[0] != values[1]
    together = next(record for record in records if record.mask == "random")
    assert together.exact_words.value == pytest.approx(np.mean(values))
    assert ablation(records, "ocr")["random"] == together.change["exact_words"]


def test_bytes_that_keep_the_accuracy(records: list[Record]) -> None:
    dense = dense_record(records, "ocr")
    found = curves(records, "ocr")
    assert list(found) == ["sparsemm", "snapkv"]
    assert 4000 < bytes_that_keep(found["sparsemm"], dense) < 8000
    assert 8000 < bytes_that_keep(found["snapkv"], dense) < 16000
    assert bytes_that_keep(found["sparsemm"], dense, share=0.1) == 4000
    exact = found["snapkv"][1].exact_words.value
    assert bytes_that_keep(found["snapkv"], dense, share=exact) == pytest.approx(8000)


def test_report(records: list[Record], tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    print_records(records, "a model", console)
    text = console.export_text()
    for part in ("a model, 40 pictures", "dense", "random heads masked (2, 2 draws)", "8 kB  50%"):
        assert part in text
    assert "sparsemm keeps 97% of the dense accuracy from" in text
    assert "silenced heads cost" in text
    save_json(tmp_path / "results.json", {"model": "a model"}, records)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["records"][0]["exact_words"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert set(saved["keeps_97_percent_from_bytes"]["ocr"]) == {"sparsemm", "snapkv"}


@pytest.mark.parametrize("what", ["all", "curves", "masks"])
def test_figure(records: list[Record], what: str, tmp_path: Path) -> None:
    shown = {
        "all": records,
        "curves": [record for record in records if record.mask is None],
        "masks": [record for record in records if record.budget is None],
    }[what]
    draw_records(shown, "a $model_1$", tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_folder_keeps_points(tmp_path: Path) -> None:
    point, configuration = Point("snapkv", 32), {"model": "a", "seed": 1}
    folder = EvalFolder(tmp_path / "new", configuration)
    found = result(0.5, 32)
    assert folder.load(point, found.settings) is None
    folder.point(point).write_text(found.model_dump_json())
    again = EvalFolder(tmp_path / "new", configuration)
    assert again.load(point, found.settings) == found
    with pytest.raises(EvalError, match=r"snapkv-32.json was measured with other settings"):
        again.load(point, {"budget": 33})
    folder.point(point).write_text(found.model_dump_json()[:-30])
    with pytest.raises(EvalError, match=r"snapkv-32.json is damaged"):
        again.load(point, found.settings)


@pytest.mark.parametrize("other", [{"model": "b", "seed": 1}, {"model": "a"}])
def test_folder_of_another_configuration(tmp_path: Path, other: dict[str, Any]) -> None:
    EvalFolder(tmp_path, {"model": "a", "seed": 1})
    with pytest.raises(EvalError, match=r"holds an evaluation with another (model|seed)"):
        EvalFolder(tmp_path, other)


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(EvalError, match="holds no evaluation"):
        EvalFolder(tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
