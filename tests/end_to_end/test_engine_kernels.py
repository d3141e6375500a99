"""The Triton kernels inside vLLM's real engine: in Triton's interpreter where there is no GPU.

The CPU backend serves with the kernels' torch twins; here it is given the kernels themselves, with
everything that they are told by the scheduler, the block tables and the slot mapping of a real run.
"""

from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def twins(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """What it answers and keeps depends neither on the size of blocks nor on drafts."""
    return start(model, tmp_path_factory.mktemp("twins"), kernels=False)


def same(kernels: Engine, twins: Engine, *prompts: Any) -> Iterator[tuple[Answer, Answer]]:
    """Answers of the kernels and of the twins, all prompts in one batch, chunked."""
    both = [engine.generate(*prompts, max_tokens=4, chunk=90) for engine in (kernels, twins)]
    assert kernels.all_free()
    for ours, theirs in zip(*both, strict=True):
        if ours.prompt_tokens > BUDGET:
            assert_same_kept(kernels.kept(ours), twins.kept(theirs))
        yield ours, theirs


# Group of 2 and a head size of 32 in the tiny model; pages of vLLM's size on GPUs, and larger ones.
@pytest.mark.parametrize(
    ("block_size", "prompts"),
    [
        (16, PROMPTS),
        *(pytest.param(size, PROMPTS, marks=pytest.mark.slow) for size in (32, 64, 128)),
        (128, PROMPTS[::2]),
    ],
)
def test_kernels_serve_as_their_twins_do(
    model: Path, twins: Engine, tmp_path: Path, block_size: int, prompts: tuple[Any, ...]
) -> None:
    kernels = start(model, tmp_path, kernels=True, block_size=block_size)
    for ours, theirs in same(kernels, twins, *prompts):
        assert_same(ours, theirs)


def test_kernels_verify_drafts(
    model: Path, twins: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    prompts = PROMPTS[::2]
    expected = twins.generate(*prompts, max_tokens=6)
    drafting = start(model, tmp_path, kernels=True, speculative_config=config)
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
def test_rounded_caches(
    model: Path, twins: Engine, tmp_path: Path, options: dict[str, str]
) -> None:
    kernels, rounded = (
        start(model, tmp_path / str(x), kernels=x, **options) for x in (True, False)
    )
    answers = list(same(kernels, rounded, *PROMPTS))
    for ours, theirs in answers:
        assert_close(ours, theirs)
    (exact,) = twins.generate(PROMPTS[1], max_tokens=4)
    assert exact.logprobs != answers[1][1].logprobs, "this cache is not rounded"
