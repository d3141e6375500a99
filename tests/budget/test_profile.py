"""Head profiles: what is read back, and one clear line for everything that is wrong."""

import json
import os
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sparsemm_vllm.budget import profile as profile_module
from sparsemm_vllm.budget.profile import (
    HeadProfile,
    ProfileError,
    bundled_profiles,
    load_profile,
    save_profile,
)
from support import tiny

GOOD = {
    "schema_version": 1,
    "model_id": "tiny",
    "num_layers": 2,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "provenance": {"method": "by hand", "samples": 3, "seconds": 0.5},
    "scores": [[0.0, 0.5, 40.0, 1.0], [2.0, 0.25, 0.0, 8.0]],
}
MEASURED = {
    "config_hash": "9f" * 32,
    "mode": "forced",
    "data": "ocr",
    "data_hash": "0a" * 32,
    "samples": 64,
    "seed": 0,
    "split_half": 0.97,
    "tool_version": "0.1.0",
    "vllm_version": "0.32.0",
    "created": "2026-11-20T23:00:00+00:00",
}


def write(folder, text):
    path = folder / "profile.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return str(path)


def refusal(name):
    """The one line that a profile is refused with, which names it."""
    with pytest.raises(ProfileError) as error:
        load_profile(name)
    message = str(error.value)
    assert message.isprintable(), "one line"
    assert name in message
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return message


def scores_with(value):
    return GOOD | {"scores": [[0.0, 0.5, value, 1.0], [2.0, 0.25, 0.0, 8.0]]}


def test_a_profile_is_read_back(tmp_path):
    profile = load_profile(write(tmp_path, GOOD))
    assert profile.model_dump(mode="json") == GOOD
    assert profile.tensor().dtype == torch.float64
    assert profile.tensor().tolist() == GOOD["scores"]


def test_what_may_be_left_out(tmp_path):
    short = {k: v for k, v in GOOD.items() if k not in ("schema_version", "provenance")}
    assert load_profile(write(tmp_path, short)).schema_version == 1


def test_how_it_was_measured_is_read_back(tmp_path):
    profile = load_profile(write(tmp_path, GOOD | MEASURED))
    assert profile.model_dump(mode="json") == GOOD | MEASURED
    assert load_profile(write(tmp_path, profile.model_dump_json())) == profile


def test_what_is_not_known_is_not_written():
    text = HeadProfile(**GOOD, mode="free").model_dump_json()
    assert set(json.loads(text)) == {*GOOD, "mode"}
    assert json.loads(HeadProfile(**GOOD, seed=0).model_dump_json())["seed"] == 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"mode": "fast"}, "'forced', 'free' or 'causal'"),
        ({"samples": 0}, "greater than or equal to 1"),
        ({"split_half": 1.01}, "less than or equal to 1"),
        ({"split_half": float("nan")}, "finite"),
        ({"config_hash": 7}, "string"),
        ({"created": ["today"]}, "string"),
        ({"seed": "first"}, "integer"),
    ],
)
def test_malformed_measurements(tmp_path, change, what):
    message = refusal(write(tmp_path, GOOD | change))
    assert f"{next(iter(change))}: " in message
    assert what in message


def test_the_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, GOOD)
    assert load_profile("~/profile.json").model_id == "tiny"


@pytest.mark.parametrize("seed", range(3))
def test_random_scores_survive_the_file_exactly(tmp_path, seed):
    profile = tiny.skewed_profile(kv_heads=(1, 2, 8)[seed])
    assert load_profile(write(tmp_path, profile.model_dump_json())) == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "EOF"),
        ("{", "EOF"),
        ("not JSON", "Invalid JSON"),
        ("[1, 2]", "object"),
        ("null", "object"),
        ('"tiny"', "object"),
        (json.dumps(GOOD)[:-1] + ",", "Invalid JSON"),
    ],
)
def test_files_that_are_not_profiles(tmp_path, text, message):
    assert message in refusal(write(tmp_path, text))


def test_a_binary_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)))
    assert "Invalid JSON" in refusal(str(path))


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"schema_version": 2}, "schema_version", "1"),
        ({"schema_version": "one"}, "schema_version", "1"),
        ({"model_id": 7}, "model_id", "string"),
        ({"num_layers": 0}, "num_layers", "greater than or equal to 1"),
        ({"num_layers": 2.5}, "num_layers", "integer"),
        ({"num_query_heads": -4}, "num_query_heads", "greater than or equal to 1"),
        ({"num_kv_heads": None}, "num_kv_heads", "integer"),
        ({"num_kv_heads": 3}, "num_kv_heads (3)", "num_query_heads (4) is no multiple"),
        ({"num_layers": 3}, "scores has 2 layers", "num_layers is 3"),
        ({"num_query_heads": 8}, "scores[0] has 4 heads", "num_query_heads is 8"),
        ({"scores": [[1.0] * 4, [1.0] * 3]}, "scores[1] has 3 heads", "num_query_heads is 4"),
        ({"scores": []}, "scores has 0 layers", "num_layers is 2"),
        ({"scores": [1.0, 2.0]}, "scores.0", "array"),
        ({"scores": "0.5"}, "scores", "array"),
        ({"scores": [[0.0] * 4] * 2}, "scores", "all zero"),
        ({"provenance": "by hand"}, "provenance", "object"),
        ({"num_heads": 4}, "num_heads", "not permitted"),
        ({"scoers": []}, "scoers", "not permitted"),
    ],
)
def test_malformed_fields(tmp_path, change, where, what):
    message = refusal(write(tmp_path, GOOD | change))
    assert where in message
    assert what in message


@pytest.mark.parametrize("field", ["model_id", "num_layers", "num_query_heads", "scores"])
def test_missing_fields(tmp_path, field):
    message = refusal(write(tmp_path, {k: v for k, v in GOOD.items() if k != field}))
    assert f"{field}: Field required" in message


@pytest.mark.parametrize(
    ("literal", "shown"),
    [
        ("-0.5", "scores[0][2] is -0.5"),
        ("NaN", "scores[0][2] is nan"),  # Python's json writes it, and JSON does not have it
        ("Infinity", "scores[0][2] is inf"),
        ("-Infinity", "scores[0][2] is -inf"),
        ("1e999", "scores[0][2] is inf"),
        ("null", "scores.0.2"),
        ('"much"', "scores.0.2"),
        ("[1.0]", "scores.0.2"),
    ],
)
def test_malformed_scores(tmp_path, literal, shown):
    text = json.dumps(scores_with(987)).replace("987", literal)
    assert shown in refusal(write(tmp_path, text))


def test_a_missing_file_names_what_there_is(monkeypatch):
    monkeypatch.setattr(profile_module, "bundled_profiles", lambda: ["llava-7b", "qwen2-vl-7b"])
    message = refusal("profiles/llava.json")
    assert "neither a file nor a bundled profile" in message
    assert "llava-7b, qwen2-vl-7b" in message
    assert "did you mean" not in refusal("something-else-altogether")


def test_a_near_miss_is_named(monkeypatch):
    monkeypatch.setattr(profile_module, "bundled_profiles", lambda: ["llava-7b", "qwen2-vl-7b"])
    assert refusal("llava-7B").endswith("; did you mean 'llava-7b'?")
    assert refusal("qwen2vl-7b").endswith("; did you mean 'qwen2-vl-7b'?")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "x" * 300,  # longer than a file name may be
        '{"model_id": "tiny", "scores": [' + "[0.5, 0.5], " * 100 + "]}",  # pasted, as a string
        "~nobody-of-that-name/profile.json",
        "no/such/folder/profile.json",
    ],
)
def test_names_that_are_no_paths(name):
    assert "neither a file nor a bundled profile" in refusal(name)


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800"])
def test_names_that_cannot_be_printed(name):
    with pytest.raises(ProfileError) as error:
        load_profile(name)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", bundled_profiles())
def test_bundled_profiles_load(name):
    profile = load_profile(name)
    assert profile.model_id
    assert profile.provenance, "where the scores come from"
    assert json.loads(profile.model_dump_json())["schema_version"] == 1


def test_bundled_names_are_those_of_the_json_files():
    folder = profile_module.resources.files("sparsemm_vllm.head_profiles")
    files = {f.name for f in folder.iterdir()}
    assert {f"{name}.json" for name in bundled_profiles()} == {
        f for f in files if f.endswith(".json")
    }


@pytest.mark.parametrize(
    "model", [(3, 4, 2), (2, 8, 2), (2, 4, 4)], ids=["layers", "query heads", "kv heads"]
)
def test_another_architecture_is_refused(model):
    profile = HeadProfile(**GOOD)
    profile.check_model(2, 4, 2)
    with pytest.raises(ProfileError) as error:
        profile.check_model(*model)
    message = str(error.value)
    assert "tiny has 2 layers, 4 query heads and 2 KV heads" in message
    assert "the model has {}, {} and {}".format(*model) in message
    assert "\n" not in message


def test_uniform_is_even_and_says_so():
    profile = HeadProfile.uniform("some/model", 3, 8, 2)
    assert profile.tensor().shape == (3, 8)
    assert profile.tensor().unique().numel() == 1
    assert "uniform" in profile.provenance["method"]
    profile.check_model(3, 8, 2)


def test_a_profile_cannot_be_changed():
    profile = HeadProfile(**GOOD)
    with pytest.raises(ValidationError):
        profile.num_layers = 3
    assert hash(profile.scores)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


def outcome(name):
    try:
        return load_profile(name), ""
    except ProfileError as error:
        return None, str(error)


@given(
    json_values
    | st.dictionaries(st.sampled_from(list(GOOD)), json_values).map(lambda change: GOOD | change)
)
def test_any_json_is_a_profile_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    profile, message = outcome(str(path))
    if profile is None:
        assert message.isprintable()
        assert str(path) in message
        return
    scores = profile.tensor()
    assert scores.shape == (profile.num_layers, profile.num_query_heads)
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()
    assert scores.any()


def test_a_profile_whose_unknown_key_spans_lines_is_refused_in_one(tmp_path):
    assert "not permitted" in refusal(write(tmp_path, GOOD | {"two\nlines": 1}))


@pytest.mark.parametrize("before", [None, "an old file"])
def test_a_saved_profile_is_read_back(tmp_path, before):
    path = tmp_path / "profile.json"
    if before:
        path.write_text(before)
    profile = HeadProfile(**GOOD, **MEASURED)
    save_profile(profile, path)
    assert load_profile(str(path)) == profile
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_profile_has_the_permissions_of_a_new_file(tmp_path):
    save_profile(HeadProfile(**GOOD), tmp_path / "profile.json")
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_link_to_a_profile_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    link = tmp_path / "profile.json"
    link.symlink_to(tmp_path / "far" / "profile.json")
    save_profile(HeadProfile(**GOOD), link)
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["profile.json"]


@pytest.mark.parametrize("before", [None, "an old file"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_write_changes_nothing(tmp_path, monkeypatch, call, fault, before):
    path = tmp_path / "profile.json"
    if before:
        path.write_text(before)

    def interrupted(*_):
        raise fault

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(type(fault)) as error:
        save_profile(HeadProfile(**GOOD), path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])
    assert isinstance(fault, KeyboardInterrupt) or error.value.filename == str(path)


def test_a_process_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    """What a killed process leaves at any point is what is there at that point."""
    path = tmp_path / "profile.json"
    path.write_text("an old file")
    profile = HeadProfile(**GOOD)
    seen = []

    def watched(name):
        real = getattr(os, name)

        def call(*arguments):
            seen.append((name, path.read_text() == "an old file"))
            if name == "replace":
                assert load_profile(str(arguments[0])) == profile, "whole before it is renamed"
            return real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name))
    save_profile(profile, path)
    # The file is on the disk before it is renamed, and the folder after it.
    assert seen == [("fsync", True), ("replace", True), ("fsync", False)]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    path = tmp_path / "none" / "profile.json"
    with pytest.raises(FileNotFoundError) as error:
        save_profile(HeadProfile(**GOOD), path)
    assert error.value.filename == str(path)
