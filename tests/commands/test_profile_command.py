"""`sparsemm profile`: what it writes, what it says, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from sparsemm_vllm.budget.profile import load_profile
from sparsemm_vllm.cli import app
from sparsemm_vllm.commands import profile as command
from sparsemm_vllm.data import load_samples
from sparsemm_vllm.profiler import ProfilerError, profile_model
from support.tiny import skewed_profile


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def fails(result: Any) -> str:
    """The one line that it says."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("sparsemm profile: ")
    return line


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `profile_model` was called with; it answers with a fixed profile."""
    seen: dict[str, Any] = {"split_half": 0.97}

    def profile(model: str, samples: Any, mode: str, **options: Any) -> Any:
        seen.update(options, model=model, samples=samples, mode=mode)
        options["on_progress"](len(samples.samples))
        if "raises" in seen:
            options["partial"].write_text("half of it")
            raise seen["raises"]
        update = {
            "split_half": seen["split_half"],
            "samples": len(samples.samples),
            "provenance": {"tokens": 99},
        }
        return skewed_profile().model_copy(update=update)

    monkeypatch.setattr(command, "profile_model", profile)
    return seen


def test_a_profile_is_written(measured: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    arguments = ["tiny", "--out", out, "--samples", 3, "--seed", 5, "--mode", "free"]
    done = invoke(*arguments, "--max-model-len", "2k", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "saved" in done.output
    assert "warning" not in done.output
    assert load_profile(str(out)).samples == 3
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert (measured["model"], measured["mode"], measured["seed"]) == ("tiny", "free", 5)
    assert measured["samples"].hash == load_samples("ocr", 3, 5).hash
    assert (measured["max_model_len"], measured["dtype"]) == (2000, "float32")
    assert "tensor_parallel_size" not in measured, "defaults are vLLM's"


@pytest.mark.parametrize(
    ("correlation", "warning"),
    [
        (0.6, "correlate with 0.60 only; 10 more samples would bring it to 0.9"),
        (-0.1, "they are noise"),
        (None, "too few samples"),
    ],
)
def test_unreliable_scores(
    measured: dict[str, Any], tmp_path: Path, correlation: float | None, warning: str
) -> None:
    measured["split_half"] = correlation
    done = invoke("tiny", "--out", tmp_path / "p.json", "--samples", 2)
    assert done.exit_code == 0
    assert warning in done.output


def test_interruption_keeps_what_is_done(measured: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    measured["raises"] = KeyboardInterrupt()
    done = invoke("tiny", "--out", out, "--samples", 2)
    assert done.exit_code == 130
    assert f"--resume continues from {out}.partial" in done.output
    assert not out.exists()


def test_an_older_profile_stays(measured: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    out.write_text("precious")
    assert "--force replaces it" in fails(invoke("tiny", "--out", out, "--samples", 1))
    measured["raises"] = ProfilerError("all scores are zero")
    line = fails(invoke("tiny", "--out", out, "--samples", 1, "--force"))
    assert line.endswith("all scores are zero")
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--tensor-parallel-sizes", "2"], "unrecognized arguments: --tensor-parallel-sizes"),
        (["--dtype", "float3"], "--dtype"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_bad_options(
    measured: dict[str, Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in fails(invoke("tiny", "--out", tmp_path / "p.json", *arguments))


@pytest.mark.parametrize("out", ["", "missing/p.json"])
def test_places_that_cannot_be_written(tmp_path: Path, out: str) -> None:
    fails(invoke("tiny", "--out", tmp_path / out))


def test_models_that_cannot_be_profiled(tmp_path: Path) -> None:
    samples = load_samples("ocr", 1, 0)
    with pytest.raises(ProfilerError, match=r"^model 'nobody/nothing': [^\n]*$"):
        profile_model("nobody/nothing", samples)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ProfilerError, match="takes no pictures"):
        profile_model(str(tmp_path), samples)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"model_type": "idefics3", "vision_config": {}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ProfilerError, match=r"'idefics3', whose image tokens.*known: llava,"):
        profile_model(str(tmp_path), samples)


def test_other_bad_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    samples = load_samples("ocr", 1, 0)
    with pytest.raises(ProfilerError, match="unknown mode 'casual'; known: forced, free"):
        profile_model("tiny", samples, "casual")
    with pytest.raises(ProfilerError, match="there are no samples"):
        profile_model("tiny", dataclasses.replace(samples, samples=[]))
    with pytest.raises(ProfilerError, match="--attention-backend is set by the profiler"):
        profile_model("sparsemm-reader", samples, attention_backend="FLASH_ATTN")


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    from sparsemm_vllm.reader import reader_folder

    for file in reader_folder().iterdir():
        if file.name not in ("chat_template.jinja", "model.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ProfilerError, match="has no chat template"):
        profile_model(str(tmp_path), load_samples("ocr", 1, 0))
