"""A model without a profile, and a program that makes one."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import HeadProfile, save_profile
from sparsemm_vllm.engine.frontend import auto_profile, profile_cache
from support.profiler_program import Program
from support.tiny import make_llava, skewed_profile


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def made(llava: Path) -> HeadProfile:
    digest = config_hash(AutoConfig.from_pretrained(llava))
    return skewed_profile().model_copy(update={"config_hash": digest})


@pytest.fixture
def program(tmp_path: Path, made: HeadProfile, monkeypatch: pytest.MonkeyPatch) -> Program:
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "tmp").mkdir()
    save_profile(made, folder / "made.json")
    stand_in = Program(folder)
    monkeypatch.setattr(auto_profile, "program", lambda *_: str(stand_in.path))
    monkeypatch.setenv("SPARSEMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profile_cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return stand_in


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    for module in (auto_profile, profile_cache):
        for level in ("info", "warning"):
            monkeypatch.setattr(module.logger, level, lambda text, *args: lines.append(text % args))
    return lines
