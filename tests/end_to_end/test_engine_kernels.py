"""The Triton kernels inside vLLM's real engine: in Triton's interpreter where there is no GPU.

The CPU backend serves with the kernels' torch twins; here it is given the kernels themselves, with
everything that they are told by the scheduler, the block tables and the slot mapping of a real run.
"""

from pathlib import Path
from typing import Any

import pytest

from sparsemm_vllm.engine.worker import state as step
from sparsemm_vllm.triton_kernels import triton_ops
from sparsemm_vllm.triton_kernels.tables import QUERIES
from support.engines import (
    DIGITS,
    HELLO,
    Answer,
    Engine,
    ask,
    assert_close,
    assert_same,
    assert_same_kept,
    settings,
)

pytestmark = pytest.mark.engine

BUDGET = 40  # of prompts of 98 and 178 tokens
PROMPTS = (ask(HELLO, 1), ask(DIGITS, 1, 2), ask("<s>short"))


def start(model: Path, folder: Path, kernels: bool, **options: Any) -> Engine:
    """An engine that runs the kernels, or their twins."""
    with pytest.MonkeyPatch.context() as patch:
        if kernels:
            patch.setattr(step, "choose_ops", lambda device: triton_ops)
        return Engine(model, settings(BUDGET, folder), limit_mm_per_prompt={"image": 2}, **options)


def same(model: Path, folder: Path, **options: Any) -> tuple[list[Answer], list[Answer]]:
    """Answers of the kernels and of the twins, all prompts in one batch, chunked."""
    engines = [start(model, folder / str(x), kernels=x, **options) for x in (True, False)]
    ours, theirs = (engine.generate(*PROMPTS, max_tokens=4, chunk=90) for engine in engines)
    for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third prompt is not pruned
        assert_same_kept(engines[0].kept(a), engines[1].kept(b))
    assert all(engine.all_free() for engine in engines)
    return ours, theirs


# Group of 2 and a head size of 32 in the tiny model; pages of vLLM's size on GPUs, and larger ones.
@pytest.mark.parametrize(
    "block_size",
    [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (32, 64)), 128],
)
def test_kernels_serve_as_their_twins_do(model: Path, tmp_path: Path, block_size: int) -> None:
    for ours, theirs in zip(*same(model, tmp_path, block_size=block_size), strict=True):
        assert_same(ours, theirs)


def test_kernels_verify_drafts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ngram speculation: several queries a row."""
    config = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    queries: set[int] = set()
    sparse_decode = triton_ops.sparse_decode

    def watch(*args: Any) -> None:
        batch = args[4]
        queries.update(batch.buffers.tiles[: batch.query_tiles, QUERIES].tolist())
        sparse_decode(*args)

    plain = start(model, tmp_path / "plain", kernels=False)
    prompts = PROMPTS[0], PROMPTS[2]
    expected = plain.generate(*prompts, max_tokens=6)
    drafting = start(model, tmp_path / "drafts", kernels=True, speculative_config=config)
    monkeypatch.setattr(triton_ops, "sparse_decode", watch)
    for ours, theirs in zip(drafting.generate(*prompts, max_tokens=6), expected, strict=True):
        assert_same(ours, theirs)
    assert 4 in queries, "no drafts were verified: the test shows nothing"
    assert drafting.all_free()


@pytest.mark.parametrize(
    "options",
    [
        # A difference of 1e-7 may round a cached number differently.
        pytest.param({"kv_cache_dtype": "fp8"}, id="fp8", marks=pytest.mark.slow),
        # The kernels round the weights before the values are multiplied.
        pytest.param({"dtype": "float16"}, id="float16", marks=pytest.mark.slow),
    ],
)
def test_rounded_caches(model: Path, tmp_path: Path, options: dict[str, str]) -> None:
    ours, theirs = same(model, tmp_path, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
    (exact,) = start(model, tmp_path / "exact", kernels=False).generate(PROMPTS[1], max_tokens=6)
    assert exact.logprobs != theirs[1].logprobs, "this cache is not rounded"
