"""Compatibility checks: one clear finding for whatever vLLM moved, and nothing half installed."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from sparsemm_vllm import plugin
from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.cpu import model_runner
from sparsemm_vllm.engine.frontend.asked import asks_for_us
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.vllm_api import compatibility, contract
from sparsemm_vllm.engine.vllm_api.compatibility import IncompatibleError, problems
from sparsemm_vllm.engine.vllm_api.hooks import ENGINE_CONFIG, HOOKS, IN_EVERY_PROCESS
from sparsemm_vllm.plugin import install

MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"


def current(hook):
    holder, name = contract.resolve(hook.symbol)
    return getattr(holder, name)


def original(function):
    while hasattr(function, "__sparsemm__"):
        function = function.__wrapped__
    return function


@pytest.fixture
def uninstalled(monkeypatch):
    """vLLM as it comes; what was installed before is back afterwards."""
    for hook in IN_EVERY_PROCESS:
        holder, name = contract.resolve(hook.symbol)
        monkeypatch.setattr(holder, name, original(getattr(holder, name)))
    assert not any(hook.is_installed() for hook in IN_EVERY_PROCESS)


def installed_version(monkeypatch, number):
    monkeypatch.setattr(compatibility, "version", {"vllm": number}.__getitem__)


def test_this_vllm_is_one_we_know():
    assert problems() == []


def test_the_checks_hold_for_what_is_wrapped_already():
    install()
    assert problems() == []


def test_a_moved_parameter(monkeypatch):
    def _remove_blocks_in_range(self, request_id, blocks):
        raise AssertionError("never called")

    monkeypatch.setattr(FullAttentionManager, "_remove_blocks_in_range", _remove_blocks_in_range)
    (problem,) = problems()
    assert problem.startswith(f"{MANAGER}._remove_blocks_in_range no longer takes first_block")
    assert "gives 3 positions" in problem


def test_a_moved_parameter_of_a_wrapped_method(monkeypatch):
    def get_computed_blocks(self, new_name):
        raise AssertionError("never called")

    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", get_computed_blocks)
    (problem,) = problems()
    assert "KVCacheManager.get_computed_blocks no longer takes request" in problem
    assert "does not take new_name in place 1, where ours has request" in problem


def test_a_missing_method(monkeypatch):
    monkeypatch.delattr(SingleTypeKVCacheManager, "pop_blocks_for_free")
    (problem,) = problems()
    assert problem.startswith(f"{MANAGER}.pop_blocks_for_free is gone: ")
    assert "no attribute 'pop_blocks_for_free'" in problem


def test_a_missing_method_that_is_wrapped(monkeypatch):
    monkeypatch.delattr(Scheduler, "_reserve_prefill_lookahead")
    (problem,) = problems()
    assert "Scheduler._reserve_prefill_lookahead: " in problem
    assert "no attribute" in problem


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("vllm.v1.no_such_module:Thing.method", "No module named"),
        ("vllm.v1.request:NoSuchClass.method", "no attribute 'NoSuchClass'"),
        ("vllm.v1.request:Request.no_such_method", "no attribute 'no_such_method'"),
    ],
)
def test_whatever_is_gone_is_named(path, what):
    with pytest.raises((ImportError, AttributeError), match=what):
        contract.resolve(path)


def test_any_version_is_admitted_where_it_is_to_be_tried(monkeypatch):
    installed_version(monkeypatch, "0.99.0")
    plant = lambda self, request: 0  # noqa: E731
    monkeypatch.setattr(Scheduler, "_reserve_prefill_lookahead", plant)
    assert "0.99.0 is installed" in problems()[0]
    monkeypatch.setenv("SPARSEMM_ANY_VLLM", "1")
    assert problems() == [], "it is tried, whatever differs"
    monkeypatch.delattr(Scheduler, "_reserve_prefill_lookahead")
    assert "_reserve_prefill_lookahead" in problems()[0], "there is nothing to wrap"


@pytest.mark.parametrize("number", ["0.32.0", "0.32.1", "0.33.0", "0.33.9", "0.32.0+cu130"])
def test_supported_versions(monkeypatch, number):
    installed_version(monkeypatch, number)
    assert problems() == []


@pytest.mark.parametrize("number", ["0.31.9", "0.34.0", "0.34.0rc1", "1.0.0", "0.34.0+cpu"])
def test_versions_out_of_range(monkeypatch, number):
    installed_version(monkeypatch, number)
    (problem,) = problems()
    assert problem.startswith(f"vLLM {number} is installed; SPARSEMM supports >=0.32,<0.34 (")
    assert "sparsemm check --run" in problem


def test_a_cpu_build_is_refused_with_a_way_out(monkeypatch):
    installed_version(monkeypatch, "0.32.0+cpu")
    (problem,) = problems()
    assert "0.32.0+cpu is a build for the CPU" in problem
    assert "pip install vllm" in problem


def test_install_refuses_with_everything_that_moved(monkeypatch, uninstalled):
    monkeypatch.delattr(SingleTypeKVCacheManager, "pop_blocks_for_free")
    monkeypatch.setattr(Scheduler, "_reserve_prefill_lookahead", lambda self, request: 0)
    with pytest.raises(IncompatibleError) as error:
        install()
    message = str(error.value)
    assert message.startswith("SPARSEMM cannot run on this vLLM: ")
    assert "pop_blocks_for_free" in message
    assert "_reserve_prefill_lookahead no longer takes num_computed_tokens" in message
    assert "\n" not in message
    assert not any(hook.is_installed() for hook in IN_EVERY_PROCESS), (
        "nothing is installed by halves"
    )


def test_install_wraps_everything_once(uninstalled):
    before = [current(hook) for hook in IN_EVERY_PROCESS]
    install()
    wrapped = [current(hook) for hook in IN_EVERY_PROCESS]
    assert all(hook.is_installed() for hook in IN_EVERY_PROCESS)
    assert [w.__wrapped__ for w in wrapped] == before
    install()
    assert [current(hook) for hook in IN_EVERY_PROCESS] == wrapped
    assert KVCacheSpecRegistry.get_manager_class(make_spec()) is SparseMMManager


def test_a_wrapper_keeps_the_name_of_what_it_wraps():
    install()
    for hook in IN_EVERY_PROCESS:
        assert current(hook).__name__ == original(current(hook)).__name__


def test_every_hook_says_why_and_until_when():
    assert all(len(hook.reason) > 20 and len(hook.until) > 20 for hook in HOOKS)


def test_the_wrappers_are_those_that_the_hooks_name():
    """The record of vLLM's signatures is compared with our source by these names."""
    put = patches.WRAPPERS | patches.WORKER_WRAPPERS | model_runner.TWINS
    put[ENGINE_CONFIG] = plugin._prepare_if_asked
    assert {hook: hook.wrapper for hook in HOOKS} == {
        hook: f"{wrapper.__module__}:{wrapper.__name__}" for hook, wrapper in put.items()
    }


def make_spec():
    layout = CacheLayout(((3, 98), (0, 16)), window=8, base=16)
    return SparseMMSpec(
        block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, layout=layout
    )


def make_manager():
    groups = [KVCacheGroupSpec(["model.layers.0"], make_spec())]
    return KVCacheManager(
        KVCacheConfig(num_blocks=9, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=100,
        scheduler_block_size=16,
        hash_block_size=16,
    )


@pytest.mark.parametrize("missing", range(len(IN_EVERY_PROCESS)))
def test_a_manager_refuses_to_run_half_installed(monkeypatch, missing):
    install()
    make_manager()
    holder, name = contract.resolve(IN_EVERY_PROCESS[missing].symbol)
    monkeypatch.setattr(holder, name, original(getattr(holder, name)))
    with pytest.raises(IncompatibleError) as error:
        make_manager()
    message = str(error.value)
    assert IN_EVERY_PROCESS[missing].symbol in message
    assert all(w.symbol not in message for i, w in enumerate(IN_EVERY_PROCESS) if i != missing)
    assert "plugin.install()" in message


def test_streaming_input_is_refused(monkeypatch):
    calls = []

    def process_inputs(self, request_id, prompt, params, priority=0, resumable=False):
        calls.append(resumable)
        return SimpleNamespace(sampling_params=params)

    process = patches._request_check(process_inputs)
    backend = SimpleNamespace(name="SPARSEMM")

    def processor(backend):
        attention = SimpleNamespace(backend=backend, backend_per_kind={})
        return SimpleNamespace(vllm_config=SimpleNamespace(attention_config=attention))

    with pytest.raises(VLLMValidationError, match="does not serve streaming input"):
        process(processor(backend), "id", "prompt", SamplingParams(), resumable=True)
    with pytest.raises(VLLMValidationError, match="does not serve streaming input"):
        process(processor(backend), "id", "prompt", SamplingParams(), 0, True)
    assert not calls
    process(processor(backend), "id", "prompt", SamplingParams())
    process(processor(None), "id", "prompt", SamplingParams(), resumable=True)
    process(processor(None), "id", "prompt", SamplingParams(), 0, True)
    assert calls == [False, True, True]


# The entry points


def test_registering_twice_is_harmless():
    plugin.register()
    member, create = AttentionBackendEnum["SPARSEMM"], EngineArgs.create_engine_config
    reduce = AttentionBackendEnum.__reduce_ex__
    plugin.register()
    assert AttentionBackendEnum["SPARSEMM"] is member
    assert EngineArgs.create_engine_config is create
    assert AttentionBackendEnum.__reduce_ex__ is reduce
    assert member.get_class().get_name() == "SPARSEMM"


def test_the_backend_is_pickled_by_a_function_that_registers_it(uninstalled):
    """A spawned engine has loaded no plugins yet when it reads its configuration."""
    plugin.register()
    member = AttentionBackendEnum["SPARSEMM"]
    pickled = pickle.dumps(member)
    assert b"backend_member" in pickled
    assert pickle.loads(pickled) is member
    assert all(hook.is_installed() for hook in IN_EVERY_PROCESS), "that process runs the scheduler"


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_other_backends_are_pickled_as_before(name):
    plugin.register()
    member = AttentionBackendEnum[name]
    pickled = pickle.dumps(member)
    assert pickle.loads(pickled) is member
    assert b"sparsemm" not in pickled


@pytest.mark.parametrize(
    ("backend", "configured", "per_kind", "asked"),
    [
        ("SPARSEMM", None, None, True),
        ("sparsemm", None, None, True),
        (None, "SPARSEMM", None, True),
        (None, None, {"decoder": "SPARSEMM"}, True),
        (None, None, None, False),
        ("FLASH_ATTN", None, {"decoder": "FLASH_ATTN"}, False),
    ],
)
def test_nothing_is_installed_unless_asked_for(backend, configured, per_kind, asked):
    attention = SimpleNamespace(backend=configured, backend_per_kind=per_kind)
    arguments = SimpleNamespace(attention_backend=backend, attention_config=attention)
    assert asks_for_us(arguments) is asked


def test_an_engine_without_us_is_left_alone(uninstalled):
    attention = SimpleNamespace(backend=None, backend_per_kind=None)
    arguments = SimpleNamespace(
        attention_backend=None, attention_config=attention, additional_config={}
    )
    create = plugin._prepare_if_asked(lambda self, *args: (self, args))
    assert create(arguments, 1, 2) == (arguments, (1, 2))
    assert not any(hook.is_installed() for hook in IN_EVERY_PROCESS)
