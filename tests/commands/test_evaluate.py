"""`sparsemm eval` from the command line to the files that it leaves."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsemm_vllm.cli import app
from sparsemm_vllm.commands.evaluate.engine import Result

READER = "sparsemm-reader"


def run(out: Path, *arguments: str, model: str = READER) -> tuple[int, str]:
    done = CliRunner().invoke(
        app, ["eval", model, "--out", str(out), *arguments], catch_exceptions=False
    )
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "snapkw"], "unknown method 'snapkw'; did you mean 'snapkv'?"),
        (["--methods", "full"], "nothing to compare with the dense cache"),
        (["--methods", "snapkv,snapkv"], "stands there twice"),
        (["--budgets", "64,32"], "budget (32 tokens) must be larger than window (32 tokens)"),
        (["--budgets", "many"], "--budgets 'many': give whole numbers separated by commas"),
        (["--budgets", ""], "nothing to compare with the dense cache"),
        (["--window", "0"], "window: Input should be greater than or equal to 1"),
        (["--tasks", "reading"], "unknown task 'reading'; known: ocr, qa"),
        (["--tasks", ""], "give at least one of the tasks ocr, qa"),
        (["--samples", "0"], "the number of samples must be at least 1, got 0"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--profile", "nothing"], "head profile 'nothing' is neither a file nor"),
        (["--mask-heads", "all"], "--mask-heads 'all' is no share"),
        (["--mask-heads", "5%", "--mask", "blind"], "unknown mask 'blind'"),
        (["--no-such-option", "3"], "engine options: unrecognized arguments: --no-such-option"),
        (["--seed", "5", "--seed=-5"], "seed must be 0 to"),
        (["--enable-prefix-caching"], "--enable-prefix-caching is set by the evaluation itself"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, output = run(tmp_path / "out", *arguments)
    assert code == 2
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sparsemm_needs_a_profile(tmp_path: Path) -> None:
    code, output = run(tmp_path / "out", model="some/model")
    assert code == 2
    assert "sparsemm needs a head profile of some/model" in output


@pytest.mark.engine
def test_a_point_of_the_reader(tmp_path: Path) -> None:
    """Two engines; then everything is there, and nothing is started again."""
    out = tmp_path / "out"
    arguments = "--methods sparsemm --budgets 96 --window 16 --tasks qa --samples 4 --max-tokens 16"
    code, output = run(out, *arguments.split())
    assert code == 0, output
    saved = json.loads((out / "results.json").read_text())
    dense, pruned = saved["records"]
    assert (dense["method"], pruned["method"], pruned["budget"]) == ("full", "sparsemm", 96)
    assert 0.7 * dense["held_bytes"] > pruned["held_bytes"] > 0
    assert pruned["kept_tokens"] < 0.6 * dense["kept_tokens"] == 0.6 * dense["prompt_tokens"]
    assert dense["exact_words"]["value"] >= 0.75  # of four answers
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"

    result = Result.model_validate_json((out / "points" / "sparsemm-96.json").read_bytes())
    n, answer = result.tasks["qa"].prompt_tokens[0], result.tasks["qa"].answers[0]
    assert len(answer) < 16
    assert result.pool_blocks <= result.tasks["qa"].held_bytes[0] // result.block_bytes + 1
    assert result.pool_blocks < n // result.block_size

    times = {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    code, again = run(out, *arguments.split())
    assert code == 0
    assert times == {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    assert "sparsemm keeps 97%" in again
    code, refused = run(out, *arguments.split(), "--seed", "7")
    assert code == 2
    assert "holds an evaluation with another seed (1000, not 7)" in refused


@pytest.mark.engine
def test_an_engine_that_fails_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = run(
        out, "--methods", "snapkv", "--samples", "1", "--max-model-len", "64", "--window", "16"
    )
    assert code == 2
    assert output.strip().splitlines()[-1].startswith("sparsemm eval: ")
    assert str(out / "logs" / "full.log") in output.replace("\n", "")
