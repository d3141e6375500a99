"""What was recorded of each supported vLLM, and what is found when the installed one is another."""

import ast
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from sparsemm_vllm import plugin
from sparsemm_vllm.cli import app
from sparsemm_vllm.engine.vllm_api import compatibility, contract, sources
from sparsemm_vllm.engine.vllm_api.compatibility import IncompatibleError
from sparsemm_vllm.engine.vllm_api.contract import (
    NO_SIGNATURE,
    Contract,
    compare,
    nearest,
    recorded,
)
from sparsemm_vllm.engine.vllm_api.hooks import HOOKS, Hook
from sparsemm_vllm.engine.vllm_api.signatures import from_text
from support.paths import ROOT

LOOKUP = "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks"
RELEASES = [known.vllm for known in recorded()]


def here() -> Contract:
    """The record of the installed release."""
    return nearest(version("vllm"))


def found(**options: Any) -> dict[str, contract.Difference]:
    return {d.symbol: d for d in compare(here(), HOOKS, **options)}


def test_this_vllm_is_as_recorded() -> None:
    assert here().vllm == version("vllm"), "of a new release, record it first"
    assert compare(here(), HOOKS) == []


@pytest.mark.parametrize("release", RELEASES)
def test_ours_take_every_call_of_every_release(release: str) -> None:
    """Whichever vLLM is installed: by position and by name, and all that we read is there."""
    (known,) = (c for c in recorded() if c.vllm == release)
    used = contract.uses(HOOKS)
    broken = {
        symbol: used[symbol].breaks(None, from_text(text))
        for symbol, text in known.signatures.items()
        if symbol in used and text != NO_SIGNATURE
    }
    assert len(broken) > 100
    assert {symbol: why for symbol, why in broken.items() if why} == {}


def test_a_record_is_made_by_a_command(tmp_path: Path) -> None:
    file = tmp_path / "made.json"
    done = CliRunner().invoke(app, ["check", "--record", str(file)])
    assert done.exit_code == 0, done.output
    assert str(file) in done.output.replace("\n", "")
    assert json.loads(file.read_text()) == json.loads(
        (contract.FOLDER / f"vllm-{'.'.join(here().vllm.split('.')[:2])}.json").read_text()
    )


def test_a_record_for_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", "--record", str(tmp_path / "none" / "made.json")])
    assert done.exit_code == 2
    assert done.stderr.endswith("made.json: No such file or directory\n")


def test_supported_versions_are_those_with_a_record() -> None:
    lowest, above = compatibility.SUPPORTED
    supported = SpecifierSet(f">={lowest},<{above}")
    assert RELEASES[0].rpartition(".")[0] == lowest
    assert int(RELEASES[-1].split(".")[1]) + 1 == int(above.partition(".")[2])
    assert all(release in supported for release in RELEASES)
    assert f'"vllm>={lowest},<{above}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("installed", "compared"),
    [
        ("0.32.0", "0.32.0"),
        ("0.32.7", "0.32.0"),
        ("0.33.0", "0.33.0"),
        ("0.33.1rc2.dev3+gabc", "0.33.0"),
        ("0.41.0", "0.33.0"),
        ("1.0.0", "0.33.0"),
        ("0.30.1", "0.32.0"),
    ],
)
def test_a_version_is_compared_with_its_own_release_or_the_newest_before(
    installed: str, compared: str
) -> None:
    assert nearest(installed).vllm == compared


# What 0.33 did to those who were written for 0.32


def narrow(original: Callable[..., Any]) -> Callable[..., Any]:
    """What stood around the prefix lookup when 0.33 came: the first request ended the engine."""

    def get_computed_blocks(self: Any, request: Any) -> Any:
        return original(self, request)

    return get_computed_blocks


NARROW = Hook(LOOKUP, f"{__name__}:narrow", "as it was", "never")


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM with one more parameter than was recorded, and this file as a module of ours."""
    module, this = sources._module, ast.parse(Path(__file__).read_text("utf-8"))
    monkeypatch.setattr(sources, "_module", lambda n: this if n == __name__ else module(n))

    def get_computed_blocks(self, request, max_cache_hit_length=None, planted=None):
        raise AssertionError("never called")

    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", get_computed_blocks)


def test_an_added_positional_parameter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    difference = found()[LOOKUP]
    assert difference.what[-1] == "takes the new parameter planted=None"
    assert difference.breaks == (), "ours passes everything on"


def test_an_added_positional_parameter_breaks_a_narrow_wrapper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    (difference,) = (d for d in compare(here(), [NARROW]) if d.symbol == LOOKUP)
    assert f"{__name__}.narrow does not take planted by position" in difference.breaks
    assert f"{__name__}.narrow does not take planted by name" in difference.breaks


def test_install_refuses_where_a_wrapper_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    rest = [hook for hook in HOOKS if hook.symbol != LOOKUP]
    monkeypatch.setattr(compatibility, "HOOKS", [*rest, NARROW])
    with pytest.raises(IncompatibleError) as error:
        plugin.install()
    assert "does not take planted by position" in str(error.value)


def test_what_breaks_nothing_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    warnings: list[str] = []
    from vllm.logger import init_logger

    monkeypatch.setattr(
        init_logger("vllm.sparsemm"), "warning", lambda text, *a: warnings.append(text % a)
    )
    assert compatibility.problems() == []
    (warning,) = warnings
    assert "takes the new parameter planted=None" in warning
    assert "sparsemm check --run" in warning


# Each kind of difference


def test_a_function_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FullAttentionManager, "cache_blocks")
    monkeypatch.delattr(FullAttentionManager.__mro__[1], "cache_blocks")
    symbol = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks"
    assert "no attribute 'cache_blocks'" in str(found()[symbol])
    assert found()[symbol].breaks


def test_a_call_of_ours_that_no_longer_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def _remove_blocks_in_range(self, request_id, blocks):
        raise AssertionError("never called")

    monkeypatch.setattr(FullAttentionManager, "_remove_blocks_in_range", _remove_blocks_in_range)
    (difference,) = found().values()
    assert difference.kind == "called"
    (first, *_) = difference.breaks
    assert first.startswith("sparsemm_vllm/engine/scheduler/manager.py:")
    assert first.endswith(" gives 3 positions")


def test_parameters_that_changed_places_under_a_call_by_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def _remove_blocks_in_range(self, request_id, last_block, first_block):
        raise AssertionError("never called")

    monkeypatch.setattr(FullAttentionManager, "_remove_blocks_in_range", _remove_blocks_in_range)
    (difference,) = found().values()
    assert any("means first_block where last_block is now" in why for why in difference.breaks)


def test_a_lost_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_num_blocks_to_allocate(
        self, request_id, num_tokens, new_computed_blocks, total_computed_tokens,
        num_local_computed_tokens, num_tokens_main_model, apply_admission_cap, prefill_end=0,
    ):  # fmt: skip
        raise AssertionError("never called")

    monkeypatch.setattr(
        FullAttentionManager, "get_num_blocks_to_allocate", get_num_blocks_to_allocate
    )
    (difference,) = found().values()
    assert difference.what == ("has no default for apply_admission_cap any more",)
    assert difference.breaks == (), "ours passes on what it is given"


def test_a_new_parameter_of_a_method_that_ours_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        AttentionBackend, "supports_head_size", classmethod(lambda cls, head_size, dtype: True)
    )
    difference = found()["vllm.v1.attention.backend:AttentionBackend.supports_head_size"]
    assert difference.what == ("takes the new parameter dtype",)
    assert any("does not take dtype by position" in why for why in difference.breaks)


def test_a_method_of_ours_that_replaces_a_new_one_by_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FullAttentionManager, "register_prompt", lambda self: None, raising=False)
    (difference,) = found().values()
    assert difference.what == ("is new",)
    assert "SparseMMManager.register_prompt stands in its place by chance" in difference.breaks[0]
    assert found(loaded_only=True) == {}


def test_what_ours_inherits_without_knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the flag of 0.33 that lets models call attention without keys."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    path = "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend"
    monkeypatch.setattr(FlashAttentionBackend, "planted", True, raising=False)
    monkeypatch.setattr(FlashAttentionBackend, "forward_includes_kv_cache_update", True)
    differences = found()
    assert differences[f"{path}.planted"].what == ("is new: ours inherits it (True)",)
    changed = differences[f"{path}.forward_includes_kv_cache_update"]
    assert changed.what == ("is `True` now, `False` before",)
    assert {d.kind for d in differences.values()} == {"inherited"}
    assert not any(d.breaks for d in differences.values())


def test_an_argument_that_ours_reads_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    def process_inputs(self, request_id, prompt, params, supported_tasks):
        raise AssertionError("never called")

    monkeypatch.setattr(InputProcessor, "process_inputs", process_inputs)
    (difference,) = found().values()
    assert "SPARSEMM reads resumable" in difference.breaks


def test_only_loaded_modules_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Contract("0.33.0", {"vllm.no_such_module:f": "a", LOOKUP: "self"})
    gone = compare(known, HOOKS)
    assert {d.symbol for d in gone if "is new" not in str(d)} == {*known.signatures}
    (loaded,) = compare(known, HOOKS, loaded_only=True)
    assert loaded.symbol == LOOKUP
