"""`"profile": "auto"`: found where it should be, made once, and never silently left out."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sparsemm_vllm import environment
from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import HeadProfile, ProfileError, save_profile
from sparsemm_vllm.engine.frontend import auto_profile, profile_cache
from sparsemm_vllm.engine.frontend.auto_profile import last_lines, run_profiler
from sparsemm_vllm.profiler.engine import open_engine
from sparsemm_vllm.reader import reader_folder
from support.profiler_program import FAIL, Program, build, engine_args, no_space
from support.tiny import skewed_profile


def test_made_once_and_read_from_then_on(
    llava: Path, program: Program, made: HeadProfile, said: list[str], capfd: Any
) -> None:
    expected = made.model_dump(mode="json")
    assert build(llava) == expected
    assert len(program.runs) == 1
    assert "One is made now" in said[0]
    assert '"none"' in said[0]
    assert "profiling\rprofile ready" in capfd.readouterr().err

    said.clear()
    assert build(llava) == expected
    assert len(program.runs) == 1
    (line,) = said
    (file,) = environment.cache_folder().glob("*.json")
    assert str(file) in line
    assert file.name.startswith("tiny-")


def test_a_failure_is_an_error_with_its_last_lines(llava: Path, program: Program) -> None:
    program.write(fail=FAIL)
    with pytest.raises(ProfileError) as error:
        build(llava)
    message = str(error.value)
    assert "ended with code 3:\nno room for the model\n" in message
    assert '"none"' in message
    assert not list(environment.cache_folder().glob("*.json"))

    program.write()
    build(llava)
    assert len(program.runs) == 2, "the lock was released"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"load_format": "dummy"}, "weights are random"),
        ({"limit_mm_per_prompt": {"image": 0}}, "pictures are switched off"),
        ({"language_model_only": True}, "pictures are switched off"),
        ({"skip_tokenizer_init": True}, "no tokenizer"),
        ({"hf_overrides": lambda config: config}, "hf_overrides is a function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_that_cannot_be_profiled_are_served_evenly_and_it_is_said(
    llava: Path, program: Program, said: list[str], options: dict[str, Any], reason: str
) -> None:
    assert build(llava, **options) == "none"
    (line,) = said
    assert "every head gets the same budget" in line
    assert reason in line
    assert not program.runs


def test_unknown_families_and_text_models(
    llava: Path, program: Program, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_args(llava, "none").create_engine_config()
    monkeypatch.setattr(auto_profile, "FAMILIES", {"other": None})
    assert auto_profile.find_profile(config, engine_args(llava)) is None
    assert "the family 'llava'" in said[-1]
    assert "(known: other)" in said[-1]
    config.model_config.multimodal_config = None
    assert auto_profile.find_profile(config, engine_args(llava)) is None
    assert "it takes no pictures" in said[-1]
    assert not program.runs


def test_what_the_user_names_is_used_as_it_is(
    llava: Path, program: Program, tmp_path: Path, said: list[str]
) -> None:
    profile = skewed_profile().model_copy(update={"model_id": "mine"})
    save_profile(profile, tmp_path / "mine.json")
    assert build(llava, str(tmp_path / "mine.json"))["model_id"] == "mine"
    assert build(llava, profile.model_dump(mode="json"))["model_id"] == "mine"
    assert build(llava, "none") == "none"
    with pytest.raises(ProfileError, match="neither a file nor a bundled"):
        build(llava, "nowhere")
    assert not program.runs
    assert not said


@pytest.mark.parametrize("known_by", ["config_hash", "model_id"])
def test_bundled_profiles_come_first(
    llava: Path, program: Program, made: HeadProfile, known_by: str, monkeypatch: Any
) -> None:
    mine = {"config_hash": made.config_hash, "model_id": str(llava)}[known_by]
    bundled = skewed_profile().model_copy(
        update={"model_id": "bundled", known_by: mine, "provenance": {"from": "the package"}}
    )
    other = skewed_profile().model_copy(update={"config_hash": "0", "model_id": str(llava)})
    profiles = {"other": other, "right": bundled}
    monkeypatch.setattr(auto_profile, "bundled_profiles", lambda: list(profiles))
    monkeypatch.setattr(auto_profile, "load_bundled_profile", profiles.__getitem__)
    assert build(llava)["provenance"] == {"from": "the package"}
    assert not program.runs


def test_the_bundled_model_has_a_bundled_profile() -> None:
    folder = str(reader_folder())
    digest = config_hash(AutoConfig.from_pretrained(folder))
    assert auto_profile.bundled_profile(folder, digest) == "sparsemm-reader"


def test_the_profilers_own_engine_asks_for_no_profile(llava: Path, program: Program) -> None:
    """Or it would start another profiler, and that another."""
    options = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 16 << 20}
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.LLM", lambda **arguments: given.update(arguments))
        open_engine(str(llava), AutoConfig.from_pretrained(llava), 64, options)
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(**given).create_engine_config()
    assert config.additional_config["sparsemm"]["profile"] == "none"
    assert not program.runs


def test_a_cache_that_cannot_be_written_does_not_stop_the_server(
    llava: Path, program: Program, made: HeadProfile, said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert build(llava) == made.model_dump(mode="json")
    assert any(f"{tmp_path}/cache cannot be written" in line for line in said)
    assert build(llava) == made.model_dump(mode="json")
    assert len(program.runs) == 1, "kept in the temporary folder"

    (tmp_path / "tmp" / f"sparsemm-{os.getuid()}").rename(tmp_path / "gone")
    (tmp_path / "tmp" / f"sparsemm-{os.getuid()}").symlink_to(tmp_path / "gone")
    assert build(llava) == made.model_dump(mode="json")
    assert len(program.runs) == 2, "another user's folder is not trusted"


def test_a_full_disk_does_not_stop_the_server(
    llava: Path, program: Program, made: HeadProfile, said: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(profile_cache, "save_profile", no_space)
    assert build(llava) == made.model_dump(mode="json")
    assert sum("No space left on device" in line for line in said) == 2


@pytest.mark.parametrize("damage", ["{", '{"schema_version": 99}', None])
def test_a_cached_profile_that_cannot_be_used_is_made_again(
    llava: Path, program: Program, made: HeadProfile, said: list[str], damage: str | None
) -> None:
    build(llava)
    (file,) = environment.cache_folder().glob("*.json")
    other = made.model_copy(update={"config_hash": "0" * 64}).model_dump_json()
    file.write_text(other if damage is None else damage)
    assert build(llava) == made.model_dump(mode="json")
    assert len(program.runs) == 2
    assert HeadProfile.model_validate_json(file.read_bytes()) == made
    assert any(str(file) in line and "not used" in line for line in said) == (damage is not None)


def test_a_model_has_one_name_online_and_offline() -> None:
    folder = "/home/me/.cache/huggingface/hub/models--org--name-7b/snapshots/abc123"
    assert auto_profile.model_id(folder) == "org/name-7b"
    assert auto_profile.model_id("org/name-7b") == "org/name-7b"
    assert auto_profile.model_id("/data/name-7b") == "/data/name-7b"


def test_another_config_has_another_profile(
    llava: Path, program: Program, made: HeadProfile
) -> None:
    first, second = (profile_cache.ProfileCache(str(llava), digest) for digest in ("a", "b"))
    assert first.file != second.file
    same_name = profile_cache.ProfileCache(f"/elsewhere/{llava.name}", "a")
    assert same_name.file != first.file
    assert profile_cache.ProfileCache("org/" + "x" * 300, "a").file.name.startswith("xxx")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_program_and_its_engine_end_with_us(end: signal.Signals) -> None:
    code = (
        "import subprocess, sys, time\n"
        "engine = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(engine.pid, flush=True); time.sleep(60)"
    )
    seen: list[str] = []

    def stop(text: str) -> None:
        seen.append(text)
        os.kill(os.getpid(), end)
        time.sleep(5)  # until the handler raises

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if end == signal.SIGINT else SystemExit):
        run_profiler([sys.executable, "-c", code], show=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert has_ended(int(seen[0]))


def test_a_program_that_leaves_something_behind_is_over(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it started may hold the pipe of its output for ever."""
    monkeypatch.setattr(auto_profile, "SAY_EVERY", 0.5)
    code = (
        "import subprocess, sys\n"
        "engine = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(engine.pid, flush=True); sys.exit(3)"
    )
    seen: list[str] = []
    began = time.monotonic()
    with pytest.raises(ProfileError, match="ended with code 3"):
        run_profiler([sys.executable, "-c", code], show=seen.append)
    assert time.monotonic() - began < 50, "it waited for what was left behind"
    assert has_ended(int("".join(seen)))


def has_ended(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


def test_last_lines_are_what_a_terminal_would_show() -> None:
    text = "start\r\n\x1b[2K 10 %\r 90 %\x1b[0m\n\n" + "".join(f"line {i}\n" for i in range(19))
    lines = last_lines(text).split("\n")
    assert lines[0] == " 90 %"
    assert lines[-1] == "line 18"
    assert len(lines) == 20


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEMM_CACHE", str(tmp_path))
    assert environment.cache_folder() == tmp_path
    monkeypatch.delenv("SPARSEMM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / "sparsemm"
