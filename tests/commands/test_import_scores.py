"""Published scores as a head profile; files that are not such, and outputs that are in the way."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsemm_vllm.budget.capacities import head_capacities
from sparsemm_vllm.budget.profile import HeadProfile, ProfileError, load_profile
from sparsemm_vllm.cli import app
from sparsemm_vllm.commands.import_scores import import_scores
from support.paths import GOLDEN

PUBLISHED = GOLDEN / "llava-next-vicuna-7b.head_scores.json"
# Two layers of four heads, not in order: neither of the file's orders nor of the numbers' texts.
GOOD = {
    "1-3": [0.5],
    "0-0": [0.0, 0.25],
    "0-1": [1, 2, 3],
    "0-2": [0, 0],
    "0-3": [1e-9, 0.0],
    "1-0": [4.0, 0.0],
    "1-2": [0.125, 0.375],
    "1-1": [7.0],
}
SCORES = [[0.125, 2.0, 0.0, 5e-10], [2.0, 7.0, 0.25, 0.5]]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source" / "scores.json"
    path.parent.mkdir()
    path.write_text(json.dumps(GOOD))
    return path


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "out" / "profile.json"
    path.parent.mkdir()
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["import-scores", *map(str, arguments)])


def refused(result, *words):
    """One line on the standard error, nothing else, exit status 2."""
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("sparsemm import-scores: ")
    for word in words:
        assert word in line
    return True


@pytest.mark.parametrize("group", [1, 4])
def test_published_scores_give_the_published_budgets(out, group):
    if not PUBLISHED.is_file():
        pytest.skip("golden data is not beside this checkout")
    budgets = np.load(PUBLISHED.with_name("head_budgets.npz"))
    heads = [] if group == 1 else ["--kv-heads", 32 // group]
    done = run(PUBLISHED, "--model-id", "llava-next-vicuna-7b", "--out", out, *heads)
    assert done.exit_code == 0, done.output
    profile = load_profile(str(out))
    profile.check_model(32, 32, 32 // group)
    names = [name for name in budgets if name.endswith(f"_group{group}")]
    assert len(names) > 10
    for name in names:
        budget, rho, _ = name.split("_")
        budget, rho = int(budget.removeprefix("budget")), float(rho.removeprefix("ratio"))
        ours = head_capacities(profile.tensor(), profile.num_kv_heads, budget, rho=rho)
        np.testing.assert_array_equal(ours.numpy(), budgets[name], err_msg=name)


def test_scores_are_means_by_layer_and_head(source):
    profile = import_scores(source, "some/model")
    assert profile.tensor().tolist() == SCORES
    profile.check_model(2, 4, 4)
    assert profile.model_id == "some/model"


def test_where_they_come_from_is_written(source, out):
    assert run(source, "--model-id", "some/model", "--out", out, "--kv-heads", 2).exit_code == 0
    profile = load_profile(str(out))
    profile.check_model(2, 4, 2)
    assert profile.provenance["source"] == "scores.json"
    assert len(profile.provenance["source_sha256"]) == 64
    assert profile.tool_version
    assert profile.created
    assert profile.mode is None, "the file does not say"


NAN, HUGE = float("nan"), 10**400
BAD = {
    "a missing head": ({k: v for k, v in GOOD.items() if k != "0-2"}, ["0-2 is missing", "7 sco"]),
    "a missing last head": ({k: v for k, v in GOOD.items() if k != "1-3"}, ["1-3 is missing"]),
    "a missing layer": (
        {k: v for k, v in GOOD.items() if k[0] != "0"},
        ["0-0 is missing", "2 layers of 4"],
    ),
    "a head far away": (GOOD | {"99999999-0": [1.0]}, ["2-0 is missing"]),
    "NaN": (GOOD | {"1-2": [0.5, NAN]}, ["1-2", "nan", "finite"]),
    "infinity": (GOOD | {"1-2": [float("inf")]}, ["1-2", "inf", "finite"]),
    "a huge integer": (GOOD | {"1-2": [HUGE]}, ["1-2", "inf", "finite"]),
    "means that are too large": (GOOD | {"1-2": [1.7e308, 1.7e308]}, ["inf", "finite"]),
    "negative": (GOOD | {"1-2": [3.0, -0.5]}, ["1-2", "-0.5", "negative"]),
    "all zero": ({key: [0.0] for key in GOOD}, ["all zero"]),
    "no scores": (GOOD | {"1-2": []}, ["1-2", "no list"]),
    "a number": (GOOD | {"1-2": 0.5}, ["1-2", "no list"]),
    "text": (GOOD | {"1-2": ["0.5"]}, ["1-2", "no number"]),
    "true": (GOOD | {"1-2": [True]}, ["1-2", "no number"]),
    "null": (GOOD | {"1-2": [None]}, ["1-2", "no number"]),
    "lists of lists": (GOOD | {"1-2": [[0.5]]}, ["1-2", "no number"]),
    "an object": (GOOD | {"1-2": {"0": 0.5}}, ["1-2", "no list"]),
    "another key": (GOOD | {"model": [1.0]}, ["'model'", "layer-head"]),
    "a key of three": (GOOD | {"1-2-3": [1.0]}, ["'1-2-3'"]),
    "a key with a sign": (GOOD | {"-1-2": [1.0]}, ["'-1-2'"]),
    "a key with a zero before it": (GOOD | {"01-2": [1.0]}, ["'01-2'"]),
    "a key in other digits": (GOOD | {"\u0661-\u0662": [1.0]}, [r"\u0661"]),
    "a key of two lines": (GOOD | {"1\n2": [1.0]}, [r"1\n2"]),
    "our own format": (json.loads(HeadProfile.uniform("m", 2, 4, 4).model_dump_json()), ["schema"]),
    "an empty object": ({}, ["no object"]),
    "a list": ([GOOD], ["no object"]),
    "null alone": (None, ["no object"]),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(source, out, name):
    content, words = BAD[name]
    source.write_text(json.dumps(content))
    assert refused(run(source, "--model-id", "m", "--out", out), str(source), *words)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (bytes(range(256)), "no JSON"),
        (b"[" * 100_000, "no JSON"),  # deeper than Python recurses
        (b'{"0-0": [1.0], "0-0": [2.0]}', "0-0 occurs twice"),  # JSON parsers take the last
        (b'{"0-0": [1e999]}', "finite"),
    ],
)
def test_texts_that_are_refused(source, out, raw, word):
    source.write_bytes(raw)
    assert refused(run(source, "--model-id", "m", "--out", out), str(source), word)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("heads", [0, -2, 3, 8])
def test_kv_heads_that_do_not_divide(source, out, heads):
    assert refused(run(source, "--model-id", "m", "--kv-heads", heads, "--out", out), "num_kv_head")
    assert not list(out.parent.iterdir())


def test_a_model_without_a_name(source, out):
    assert refused(run(source, "--model-id", " ", "--out", out), "model id is empty")


def test_a_file_that_is_missing_or_a_folder(tmp_path, out):
    for name, word in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory")):
        assert refused(run(name, "--model-id", "m", "--out", out), str(name), word)
    assert not list(out.parent.iterdir())


def test_an_output_that_exists_is_kept_unless_forced(source, out):
    out.write_text("mine")
    arguments = (source, "--model-id", "m", "--out", out)
    assert refused(run(*arguments), str(out), "exists", "--force")
    assert out.read_text() == "mine"
    assert run(*arguments, "--force").exit_code == 0
    assert load_profile(str(out)).tensor().tolist() == SCORES
    assert list(out.parent.iterdir()) == [out]


def test_a_bad_file_does_not_replace_an_output_though_forced(source, out):
    out.write_text("mine")
    source.write_text("{}")
    assert refused(run(source, "--model-id", "m", "--out", out, "--force"), "no object")
    assert out.read_text() == "mine"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_that_is_a_folder(source, out, force):
    arguments = (source, "--model-id", "m", "--out", out.parent, *force)
    assert refused(run(*arguments), str(out.parent), "is a folder")


def test_an_output_in_a_folder_that_does_not_exist(source, tmp_path):
    path = tmp_path / "none" / "profile.json"
    assert refused(run(source, "--model-id", "m", "--out", path), f"{path}: No such file")


def test_a_disk_that_is_full_leaves_the_old_file(source, out, monkeypatch):
    out.write_text("mine")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = run(source, "--model-id", "m", "--out", out, "--force")
    assert refused(done, f"{out}: No space left on device")
    assert [path.read_text() for path in out.parent.iterdir()] == ["mine"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


def outcome(path):
    try:
        return import_scores(path, "m"), ""
    except ProfileError as error:
        return None, str(error)


@given(
    json_values
    | st.dictionaries(st.from_regex(r"[0-2]-[0-2]", fullmatch=True), st.lists(st.floats(0, 1)))
)
def test_any_json_is_a_profile_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "scores.json"
    path.write_text(json.dumps(content))
    profile, message = outcome(path)
    assert message.isprintable()
    assert message or {f"{i}-{j}" for i, j in np.ndindex(*profile.tensor().shape)} == set(content)
