"""Settings: nothing is ignored, and every refusal is one line that names the setting."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from sparsemm_vllm.budget.profile import HeadProfile, ProfileError
from sparsemm_vllm.budget.settings import Settings, SettingsError
from support import tiny

INLINE = tiny.skewed_profile().model_dump(mode="json")


def parse(**values):
    return Settings.from_additional_config({"sparsemm": values})


def refusal(config):
    with pytest.raises(SettingsError) as error:
        Settings.from_additional_config(config)
    message = str(error.value)
    assert message.isprintable(), "one line"
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return message


@pytest.mark.parametrize("config", [{}, None, {"sparsemm": {}}, {"other_plugin": {"budget": 3}}])
def test_the_defaults_are_the_papers(config):
    settings = Settings.from_additional_config(config)
    assert settings == Settings()
    assert (settings.budget, settings.window, settings.rho) == (256, 32, 0.1)
    assert (settings.pool_kernel, settings.min_prompt_tokens) == (5, 0)
    assert settings.profile == "auto"
    assert (settings.method, settings.redistribute) == ("sparsemm", False)


def test_every_setting_arrives():
    values = {
        "profile": INLINE,
        "budget": 64,
        "rho": 0.3,
        "window": 8,
        "method": "random_heads",
        "redistribute": True,
        "pool_kernel": 7,
        "min_prompt_tokens": 100,
    }
    settings = parse(**values)
    arrived = settings.model_dump(mode="json", include=set(values))
    assert arrived == values
    assert isinstance(settings.profile, HeadProfile)


def test_settings_pass_through_the_configuration_unchanged():
    """`prepare_config` puts them back as JSON, for the other processes to read."""
    settings = parse(profile=INLINE, budget=64, rho=0.3)
    again = parse(**json.loads(settings.model_dump_json()))
    assert again == settings
    assert again.profile.tensor().equal(settings.profile.tensor())


def test_settings_are_written_as_they_were_given():
    """Nothing that was left out: `sparsemm eval` compares them with those of an earlier run."""
    values = {"profile": INLINE, "budget": 64, "mask_heads": [[0, 3]]}
    given = Settings.from_values(values)
    assert json.loads(json.dumps(given.as_values())) == values
    assert Settings.from_values(given.as_values()) == given
    changed = given.model_copy(update={"record_kept": "folder"})
    assert changed.as_values() == values | {"record_kept": "folder"}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("buget", "budget"),
        ("Budget", "budget"),
        ("windows", "window"),
        ("ratio", None),
        ("poolkernel", "pool_kernel"),
        ("kernel_size", None),
        ("min_prompt_token", "min_prompt_tokens"),
        ("profiles", "profile"),
        ("", None),
        ("two\nlines", None),
    ],
)
def test_unknown_settings(key, nearest):
    message = refusal({"sparsemm": {"budget": 64, key: 1}})
    assert repr(key)[1:-1] in message
    if nearest:
        assert f"did you mean '{nearest}'?" in message
    else:
        assert "did you mean" in message or "known: profile, budget, rho, window" in message


def test_of_several_unknown_settings_the_first_is_named():
    keys = {f"unheard_of_{i}": 1 for i in range(20)}
    assert "unheard_of_0'" in refusal({"sparsemm": keys})


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("snapvk", "did you mean 'snapkv'?"),
        ("AdaKV", "did you mean 'adakv'?"),
        ("pyramid_kv", "did you mean 'pyramidkv'?"),
        ("h2o", "known: sparsemm, full, snapkv, pyramidkv, adakv, random, random_heads"),
        ("", "known: sparsemm"),
        ("snap\nkv", "'snap\\nkv'"),
    ],
)
def test_unknown_methods(method, hint):
    message = refusal({"sparsemm": {"method": method}})
    assert message.startswith("sparsemm setting method: unknown method ")
    assert hint in message


@pytest.mark.parametrize("key", ["sparsem", "SparseMM", "sparse_mm", "sparsmm", "SPARSEMM"])
def test_a_mistyped_section_is_not_ignored(key):
    message = refusal({key: {"budget": 64}})
    assert f"'{key}'" in message
    assert "did you mean 'sparsemm'?" in message


@pytest.mark.parametrize("values", [None, 256, "budget=256", [256], True])
def test_the_section_must_be_an_object(values):
    message = refusal({"sparsemm": values})
    assert "'sparsemm' must be an object" in message
    assert repr(values) in message


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"budget": 32}, "budget (32 tokens)", "larger than window (32 tokens)"),
        ({"budget": 31}, "budget (31 tokens)", "larger than window (32 tokens)"),
        ({"window": 64, "budget": 64}, "window (64 tokens)", "budget (64 tokens)"),
        ({"window": 65}, "window", "less than or equal to 64"),  # the kernels' limit
        ({"window": 0}, "window", "greater than or equal to"),
        ({"window": -3}, "window", "greater than or equal to"),
        ({"budget": 0}, "budget", "greater than or equal to"),
        ({"method": 3}, "method", "string"),
        ({"method": None}, "method", "string"),
        ({"redistribute": 1}, "redistribute", "boolean"),
        ({"budget": 256.5}, "budget", "integer"),
        ({"budget": "much"}, "budget", "integer"),
        ({"budget": "256"}, "budget", "integer"),
        ({"budget": True}, "budget", "integer"),
        ({"budget": None}, "budget", "integer"),
        ({"budget": [256]}, "budget", "integer"),
        ({"budget": float("nan")}, "budget", "integer"),
        ({"budget": float("inf")}, "budget", "integer"),
        ({"window": {"tokens": 32}}, "window", "integer"),
        ({"rho": -0.1}, "rho", "greater than or equal to 0"),
        ({"rho": 1.1}, "rho", "less than or equal to 1"),
        ({"rho": float("nan")}, "rho", ""),
        ({"rho": float("inf")}, "rho", "less than or equal to 1"),
        ({"rho": "a tenth"}, "rho", "number"),
        ({"pool_kernel": 4}, "pool_kernel (4)", "odd"),
        ({"pool_kernel": 0}, "pool_kernel", "greater than or equal to 1"),
        ({"pool_kernel": -1}, "pool_kernel", "greater than or equal to 1"),
        ({"min_prompt_tokens": -1}, "min_prompt_tokens", "greater than or equal to 0"),
        ({"profile": 7}, "profile", "string"),
        ({"profile": None}, "profile", "string"),
        ({"profile": ["llava"]}, "profile", "string"),
        ({"profile": {}}, "profile: model_id", "required"),
        ({"profile": INLINE | {"num_layers": 7}}, "profile: scores has 4 layers", "is 7"),
        ({"profile": INLINE | {"schema_version": 2}}, "profile: schema_version", "1"),
        ({"profile": INLINE | {"name": "x"}}, "profile: name", "not permitted"),
        ({"profile": INLINE | {"two\nlines": "x"}}, "profile: two", "not permitted"),
    ],
)
def test_values_a_setting_cannot_have(change, where, what):
    message = refusal({"sparsemm": change})
    assert message.startswith("sparsemm setting ")
    assert where in message
    assert what in message


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 3, "window": 2},  # the least
        {"budget": 33},  # one token besides the window
        {"rho": 0},
        {"rho": 1},
        {"pool_kernel": 1},
        {"min_prompt_tokens": 0},
    ],
)
def test_values_at_the_edge_are_allowed(change):
    parse(**change)


def test_settings_cannot_be_changed():
    settings = parse()
    with pytest.raises(ValidationError):
        settings.budget = 64


def test_a_named_profile_is_loaded_once(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(INLINE))
    settings = parse(profile=str(path), budget=64)
    loaded = settings.with_profile_loaded()
    path.unlink()
    assert settings.profile == str(path)
    assert loaded.profile == HeadProfile(**INLINE)
    assert loaded.budget == 64
    assert loaded.with_profile_loaded() is loaded
    with pytest.raises(ProfileError, match="neither a file"):
        settings.with_profile_loaded()


@pytest.mark.parametrize("name", ["auto", "none"])
def test_names_that_are_no_file_stay(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(json.dumps(INLINE))
    assert parse(profile=name).with_profile_loaded().profile == name
    assert parse(profile=f"./{name}").with_profile_loaded().profile == HeadProfile(**INLINE)


@pytest.mark.parametrize("name", ["Auto", "None", "non"])
def test_names_that_were_meant_are_suggested(name):
    with pytest.raises(ProfileError, match=r"did you mean '(auto|none)'"):
        parse(profile=name).with_profile_loaded()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(sorted(INLINE)), inner, max_size=4)
    ),
    max_leaves=12,
)
near_misses = st.dictionaries(st.sampled_from(sorted(Settings.model_fields)), json_values)


def outcome(config):
    try:
        return Settings.from_additional_config(config).with_profile_loaded(), ""
    except (SettingsError, ProfileError) as error:
        return None, str(error)


@given(
    json_values
    | st.dictionaries(st.sampled_from(["sparsemm", "sparsem"]), json_values)
    | st.fixed_dictionaries({"sparsemm": near_misses})
)
@example({"sparsemm": {"budget": 10**400}})
@example({"sparsemm": {"budget": 1e308}})
@example({"sparsemm": {"profile": "\ud800"}})
@example({"sparsemm": {"\n": 1}})
def test_any_json_gives_settings_or_one_line(config):
    """Nothing else is ever raised, and what is accepted can be used."""
    settings, message = outcome(config)
    if settings is None:
        assert message.isprintable()
        return
    assert 1 <= settings.window < settings.budget < 2**31
    assert 0 <= settings.rho <= 1
    assert settings.pool_kernel % 2 == 1
