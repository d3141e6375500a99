"""`sparsemm check`: complete, and a list of whatever moved."""

import importlib

import pytest
from typer.testing import CliRunner
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from sparsemm_vllm.cli import app
from sparsemm_vllm.commands.check import differences as canary
from sparsemm_vllm.commands.check.differences import Finding, _missing_attribute, check
from sparsemm_vllm.engine.vllm_api import compatibility


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def moved() -> list[Finding]:
    return [finding for finding in check() if finding.problem]


def test_this_vllm_has_everything() -> None:
    code, output = run("--all")
    assert code == 0, output
    assert "Scheduler._reserve_prefill_lookahead" in output
    assert "differs" not in output
    count = len(check())
    assert f"{count} of {count} symbols are as recorded of vLLM 0.3" in output


def test_another_release_gives_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its version: everything that moved, not the first of it."""
    monkeypatch.setattr(compatibility, "version", {"vllm": "0.40.1"}.__getitem__)
    monkeypatch.setattr(FullAttentionManager, "remove_skipped_blocks", lambda self, request: None)
    monkeypatch.setattr(
        AttentionBackend, "supports_head_size", classmethod(lambda cls, head_size, dtype: True)
    )
    monkeypatch.setitem(canary.ATTRIBUTES, "vllm.v1.request:Request", "request_id prompt_size")
    code, output = run()
    assert code == 1
    text = " ".join(output.split())
    assert "FullAttentionManager.remove_skipped_blocks no longer takes request_id" in text
    assert "breaks overridden vllm.v1.attention.backend:AttentionBackend.supports_head_size" in text
    assert "AttentionBackend.supports_head_size takes the new parameter dtype" in text
    assert "symbols are as recorded of vLLM 0.33.0" in text, "the newest before it"
    assert "vllm.v1.request:Request has no attribute prompt_size" in text
    assert "vLLM 0.40.1 is installed; SPARSEMM supports >=0.32,<0.34" in text
    assert "Traceback" not in text
    assert "Request.request_id" not in text, "what is as expected is not listed"


def test_a_module_that_fails_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def fail(name: str, package: str | None = None) -> object:
        if name == "vllm.v1.engine":
            raise RuntimeError("needs another driver")
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", fail)
    assert [finding.problem for finding in moved()] == [
        "vllm.v1.engine:EngineCoreOutputs.scheduler_stats: RuntimeError: needs another driver"
    ]


def test_an_unsupported_version_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "version", {"vllm": "0.31.0"}.__getitem__)
    code, output = run()
    assert code == 1
    assert "breaks" not in output
    assert "vLLM 0.31.0 is installed" in output


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("vllm.v1.request:Request", "is_finished"),  # a method
        ("vllm.v1.request:Request", "num_prompt_tokens"),  # set on instances
        ("vllm.v1.metrics.stats:SchedulerStats", "ec_connector_stats"),  # of a dataclass
        ("vllm.v1.engine:EngineCoreOutputs", "scheduler_stats"),  # of a msgspec.Struct
        ("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager", "block_pool"),  # a base
    ],
)
def test_attributes(path: str, name: str) -> None:
    assert _missing_attribute(path, name) is None
    missing = _missing_attribute(path, f"{name}_s")
    assert missing is not None
    assert missing.startswith(path)
