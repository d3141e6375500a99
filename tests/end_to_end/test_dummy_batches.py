"""Batches that stand for none, as data-parallel ranks without requests run them beside the others.

There are no CUDA graphs on the CPU. `Graphs` replays what was captured as a graph does: with the
metadata of the capture, whatever its tensors hold now.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from sparsemm_vllm.triton_kernels.tables import COMPACT_BLOCKS
from support.engines import Engine, assert_same, settings
from support.tiny import make_llama

pytestmark = pytest.mark.engine

SIZES = 1, 2, 4, 8
PROMPTS = [{"prompt_token_ids": [5 + (i * k) % 90 for i in range(100)]} for k in (1, 3, 7)]


class Graphs:
    """Stands in for the model runner's graphs, of decode batches.

    Args:
        runner: vLLM's model runner.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.own = runner, runner.cudagraph_manager
        self.captured: dict[int, tuple[Any, Any]] = {}
        self.replays = 0
        self.prepare = runner.model_state.prepare_attn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, **kwargs: Any
    ) -> BatchExecutionDescriptor:
        """A captured size for decodes, as vLLM chooses it; nothing captured for others."""
        if uniform_token_count != 1:
            return self.own.dispatch(num_reqs, num_tokens, uniform_token_count, **kwargs)  # type: ignore[no-any-return]
        size = next(size for size in SIZES if size >= num_reqs)
        return BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, 1)

    def prepare_attn(
        self, batch: Any, mode: Any, tables: Any, slots: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        """As the model state's; the first of a size is its capture."""
        metadata = self.prepare(batch, mode, tables, slots, *rest, **kwargs)
        size = batch.num_reqs_after_padding
        if kwargs["for_capture"] and size not in self.captured:
            by_layer = build_slot_mappings_by_layer(slots, self.runner.kv_cache_config)
            self.captured[size] = metadata, by_layer
        return metadata

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> torch.Tensor:
        """The model over the buffers, with the metadata of the capture."""
        runner, size = self.runner, desc.num_tokens
        metadata, slots = self.captured[size]
        self.replays += 1
        config = runner.vllm_config
        with set_forward_context(metadata, config, num_tokens=size, slot_mapping=slots):
            buffers = runner.input_buffers
            return runner.model(  # type: ignore[no-any-return]
                input_ids=buffers.input_ids[:size], positions=buffers.positions[:size]
            )


def run_dummy(engine: Engine, runner: Any, requests: int) -> None:
    """A dummy batch reads no request, and writes to none."""
    cache, state = engine.state.cache.tensor, engine.state
    blocks, lengths = cache[:, 1:].clone(), state.pages.lengths.clone()
    runner._dummy_run(requests, uniform_decode=True)
    torch.testing.assert_close(cache[:, 1:], blocks, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(state.pages.lengths, lengths)
    rows = state.buffers.tiles[:requests]
    assert (rows[:, COMPACT_BLOCKS] == 0).all(), "the rows of the step before"


def test_dummy_batches_beside_pruned_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every step, of more rows or fewer; real decodes are replays, of padded batches too."""
    engine = Engine(make_llama(tmp_path / "model"), settings(40))
    eager = engine.generate(*PROMPTS, max_tokens=20)
    engine.forget()
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    graphs = Graphs(runner)
    monkeypatch.setattr(runner.model_state, "prepare_attn", graphs.prepare_attn)
    monkeypatch.setattr(runner, "cudagraph_manager", graphs)
    for size in SIZES:
        runner._dummy_run(size, uniform_decode=True)
    assert sorted(graphs.captured) == sorted(SIZES)
    steps = 0

    def watch() -> None:
        nonlocal steps
        steps += 1
        run_dummy(engine, runner, SIZES[steps % 4])

    replayed = engine.generate(*PROMPTS, max_tokens=20, chunk=80, watch=watch)
    assert graphs.replays > steps + 15, "decodes of the requests should have been replays"
    for ours, expected in zip(replayed, eager, strict=True):
        assert_same(ours, expected)
    engine.rest()
