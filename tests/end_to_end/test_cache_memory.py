"""Where vLLM puts the KV cache: a profiled one is gone before the real one, any layout serves."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.engines import BLOCK, HELLO, Answer, Engine, ask, assert_same, settings

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, settings(40))


@pytest.fixture(scope="module")
def expected(engine: Engine) -> Answer:
    (answer,) = engine.generate(ask(HELLO, 1))
    engine.rest()
    return answer


@pytest.mark.parametrize("layout", ["LBHNC", "BLNHC"])  # the default is LBNHC
def test_layouts(
    model: Path, expected: Answer, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads outermost in a block, as on GPUs; blocks outermost, layers inside them."""
    monkeypatch.setattr("vllm.envs.VLLM_KV_CACHE_LAYOUT", layout, raising=False)
    other = Engine(model, settings(40))
    assert_same(*other.generate(ask(HELLO, 1)), expected)
    _, blocks, _, tokens, _ = other.state.cache.tensor.stride()
    assert other.state.page_size == BLOCK
    layers, _, heads, _, columns = other.state.cache.tensor.shape
    assert tokens == (columns if layout == "LBHNC" else heads * columns)
    assert blocks == BLOCK * heads * columns * (1 if layout == "LBHNC" else layers)


def test_the_profiling_cache_is_released(
    engine: Engine, expected: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `GPUWorker` profiles CUDA graphs and sizes the cache; only nothing is captured."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu import model_runner as runner_module

    runner = engine.core.model_executor.driver_worker.worker.model_runner
    real_config = runner.kv_cache_config
    for name in ("synchronize", "empty_cache"):  # which torch refuses without an accelerator
        monkeypatch.setattr(torch.accelerator, name, lambda: None)
    monkeypatch.setattr(runner.compilation_config, "max_cudagraph_capture_size", 4)
    cudagraph_utils._teardown_profiling_state(runner)  # an engine that starts has no cache yet
    runner.model_state.release_kv_cache()
    profiled: list[weakref.ref[Any]] = []

    def profile(runner: Any) -> int:
        with set_current_vllm_config(runner.vllm_config):
            cudagraph_utils._init_minimal_kv_cache_for_profiling(runner)
        storage = engine.state.cache.tensor.untyped_storage()
        assert storage.nbytes() < sum(t.size for t in real_config.kv_cache_tensors)
        profiled.append(weakref.ref(storage))
        del storage
        gc.collect()
        assert profiled[0]() is not None
        cudagraph_utils._teardown_profiling_state(runner)
        return 7

    monkeypatch.setattr(runner_module, "_profile_cudagraph_memory", profile)
    assert runner.profile_cudagraph_memory() == 7
    gc.collect()
    assert profiled[0]() is None
    with pytest.raises(AssertionError, match="not allocated the KV cache yet"):
        _ = engine.state.cache

    with set_current_vllm_config(runner.vllm_config):
        runner.initialize_kv_cache(real_config)
    runner.cache_config.num_gpu_blocks = real_config.num_blocks
    answer, *_ = engine.generate(ask(HELLO, 1))
    assert_same(answer, expected)
    assert engine.state.cache.tensor.shape[1] == real_config.num_blocks


def test_other_models_of_the_process_are_left_alone() -> None:
    from sparsemm_vllm.engine.patches import _graph_memory

    dense = SimpleNamespace(model_state=object())
    assert _graph_memory(lambda runner, *rest: (runner, rest))(dense, 3) == (dense, (3,))
