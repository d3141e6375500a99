"""KV blocks of other sizes than vLLM's 16 tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends import flash_attn

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check.oracle import Oracle
from sparsemm_vllm.engine.attention.cuda import SparseMMBackend as CudaBackend
from sparsemm_vllm.engine.config import UnsupportedError
from sparsemm_vllm.engine.cpu.attention import SparseMMBackend as CpuBackend
from sparsemm_vllm.engine.spec import SparseMMSpec
from support.configs import refused
from support.engines import (
    DIGITS,
    HELLO,
    WINDOW,
    Engine,
    ask,
    assert_same,
    assert_same_kept,
    settings,
)
from support.tiny import KV_HEADS, picture, skewed_profile

BUDGET = 40  # of prompts of 98 and 178 tokens
TOKENS = 20


@pytest.mark.engine
@pytest.mark.parametrize("block_size", [64, 128])
def test_other_block_sizes(model: Path, tmp_path: Path, block_size: int) -> None:
    """As in transformers, cold and cached; generated tokens enter a block of their own.

    A block of 128 tokens holds the first prompt whole: nothing of it can be freed.
    """
    engine = Engine(
        model,
        settings(BUDGET, tmp_path),
        block_size=block_size,
        limit_mm_per_prompt={"image": 2},
    )
    assert engine.manager.block_size == engine.state.page_size == block_size
    held: dict[tuple[int, int], int] = {}

    def watch() -> None:
        for request in engine.scheduler.running:
            sizes = request.num_prompt_tokens, request.num_computed_tokens
            held[sizes] = engine.held(request.request_id)

    oracle = Oracle(model, engine.layout)
    for text, seeds in ((HELLO, (1,)), (DIGITS, (1, 2))):
        (cold,) = engine.generate(ask(text, *seeds), max_tokens=TOKENS, watch=watch)
        tokens, logprobs = oracle.generate(text, [picture(seed) for seed in seeds], TOKENS)
        assert cold.tokens == tokens
        np.testing.assert_allclose(cold.logprobs, logprobs, atol=1e-4)
        kept = engine.kept(cold)
        assert_same_kept(kept, {head: positions.numpy() for head, positions in oracle.kept.items()})
        (cached,) = engine.generate(ask(text, *seeds), max_tokens=TOKENS)
        n = cold.prompt_tokens
        assert cached.cached_tokens == (n - WINDOW) // block_size * block_size
        assert_same(cached, cold)
    behind = {sizes: blocks for sizes, blocks in held.items() if sizes[1] > sizes[0]}
    assert len(behind) > TOKENS
    for (n, total), blocks in behind.items():
        assert blocks == engine.layout.held_blocks(n, total, block_size)
    engine.rest()
    chunked = engine.generate(ask("<s>short"), ask(DIGITS, 1, 2), max_tokens=TOKENS, chunk=60)[1]
    assert_same(chunked, cold)


@pytest.mark.engine
def test_a_kernel_that_splits_blocks_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes every multiple of the kernel's size; head pages are as large as a block."""
    monkeypatch.setattr(CpuBackend, "get_supported_kernel_block_sizes", lambda *_: [32])
    with pytest.raises(UnsupportedError, match="splits blocks of 64 tokens into blocks of 32"):
        Engine(model, settings(BUDGET), block_size=64)


def test_block_sizes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of FlashAttention's 16 tokens; for heads of 256 Blackwell's kernel wants 128."""
    plain = {"head_size": 128, "dtype": torch.bfloat16}
    for size in (16, 32, 64, 128):
        assert refused(CudaBackend, block_size=size, **plain) == []
    for size in (8, 24):
        assert refused(CudaBackend, block_size=size, **plain) == ["block_size not supported"]
    assert CudaBackend.get_preferred_block_size(16) == 16

    monkeypatch.setattr(flash_attn, "uses_fa4_hd256_kernel", lambda *_: True)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *_, **__: 4)
    spec = SparseMMSpec(
        block_size=128,
        num_kv_heads=KV_HEADS,
        head_size=256,
        dtype=torch.bfloat16,
        layout=CacheLayout.from_scores(skewed_profile().tensor(), KV_HEADS, BUDGET, WINDOW),
    )
    assert CudaBackend.get_supported_kernel_block_sizes(spec) == [128]
