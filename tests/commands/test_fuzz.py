"""Commands on files and options that nobody would write: our own errors in one line, or results."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsemm_vllm.cli import app
from sparsemm_vllm.data import DataError, load_samples
from support.tiny import skewed_profile

PROFILE = json.loads(skewed_profile().model_dump_json())
SCORES = {f"{layer}-{head}": [0.5, layer + head] for layer in range(2) for head in range(4)}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20]}],
    "categories": [{"id": 1, "name": "cat"}],
}
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 1e308, 5e-324, 10**400, "", "\ud800", "\n", [], {}, [[]]]),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a value."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    for key, child in children:
        nested = isinstance(child, dict | list)
        found += places(child, (*path, key)) if nested else [(*path, key)]
    return found


@st.composite
def nearly(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON file with something else in one or two places, missing parts, or a bad end."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(places(changed) or [("extra",)]))
        holder = changed
        for key in parents:
            holder = holder[key]
        if draw(st.booleans()):
            holder[last] = draw(scalars)
        else:
            del holder[last]
    text = json.dumps(changed).encode()
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


def files(value: Any) -> st.SearchStrategy[bytes]:
    return nearly(value) | st.binary(max_size=64)


def run(*arguments: Any) -> None:
    """The command ends with a result, or in a line that says what is wrong."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    assert done.exit_code in (0, 2), done.output
    if done.exit_code == 2 and "Usage:" not in done.stderr:  # typer's own, of options
        assert done.stderr.startswith(f"sparsemm {arguments[0]}: ")
        assert done.stderr.count("\n") == 1
        assert done.stderr[:-1].isprintable()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file.json"


@settings(max_examples=60)
@given(content=files(PROFILE))
def test_profiles(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    run("plan", file, "--prompt-tokens", 3000, "--kv-memory", 1)


@settings(max_examples=25)
@given(content=files(PROFILE))
def test_profiles_are_shown(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    run("show", file)


numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 16, 2**31 - 1, 2**31, "x", ""])
OPTIONS = ("budget", "answer-tokens", "kv-memory", "block-size", "head-size", "window", "rho")


@settings(max_examples=60)
@given(
    prompt_tokens=numbers | st.integers(1, 10**6),
    options=st.dictionaries(st.sampled_from(OPTIONS), numbers, max_size=3),
    method=st.text(max_size=8) | st.sampled_from(["sparsemm", "adakv", "pyramidkv", "full"]),
)
@example(1, {"budget": 2**30 + 1000}, "pyramidkv")  # its first layer gets nearly twice the budget
@example(2**31 - 1, {"budget": 2**31 - 1}, "pyramidkv")
def test_options(file: Path, prompt_tokens: Any, options: dict[str, Any], method: str) -> None:
    file.write_text(json.dumps(PROFILE))
    words = [f"--{name}={value}" for name, value in options.items()]
    run("plan", file, f"--prompt-tokens={prompt_tokens}", f"--method={method}", *words)


@settings(max_examples=60)
@given(content=files(SCORES), kv_heads=st.sampled_from([None, -1, 0, 1, 3, 4, 2**40]))
def test_scores(file: Path, content: bytes, kv_heads: int | None) -> None:
    file.write_bytes(content)
    heads = [] if kv_heads is None else [f"--kv-heads={kv_heads}"]
    out = file.with_name("out.json")
    run("import-scores", file, "--model-id", "m", "--out", out, "--force", *heads)


@settings(max_examples=60)
@given(content=files(COCO), suffix=st.sampled_from(["json", "parquet", "arrow"]))
def test_data(file: Path, content: bytes, suffix: str) -> None:
    source = file.with_suffix(f".{suffix}")
    source.write_bytes(content)
    with suppress(DataError):
        load_samples(str(source), 1, 0)
