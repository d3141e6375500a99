"""Every method in vLLM's real engine. One engine serves them all, one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check.oracle import Oracle
from sparsemm_vllm.engine.worker.state import choose_ops
from sparsemm_vllm.triton_kernels import triton_ops
from support.engines import (
    BLOCK,
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

pytestmark = pytest.mark.engine

BUDGET = 40  # of prompts of 98 and 178 tokens
TOKENS = 6
METHODS = {
    "sparsemm, redistributed": {"redistribute": True},
    **{name: {"method": name} for name in ("snapkv", "pyramidkv", "adakv", "random")},
    "random_heads, redistributed": {"method": "random_heads", "redistribute": True},
}


def make_layout(**options: Any) -> CacheLayout:
    scores = skewed_profile().tensor()
    return CacheLayout.from_scores(scores, KV_HEADS, BUDGET, WINDOW, **options)


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("kept")
    options = {"limit_mm_per_prompt": {"image": 2}, "max_model_len": 448}
    return Engine(model, settings(BUDGET, folder, method="adakv"), **options)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model, make_layout())


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.state.ops = choose_ops(engine.state.workspace.scores.device)
    engine.rest()


def test_settings_reach_the_scheduler_and_the_worker(engine: Engine) -> None:
    expected = make_layout(method="adakv", largest_budget=2 * BUDGET)
    assert engine.layout == engine.state.layout == expected


@pytest.mark.parametrize("name", METHODS)
def test_every_method(engine: Engine, oracle: Oracle, name: str) -> None:
    """As in transformers; cached, and chunked, beside others and preempted, as cold and alone."""
    layout = make_layout(**METHODS[name])
    engine.use(layout)
    held: dict[int, int] = {}

    def watch() -> None:
        for request in engine.scheduler.running:
            held[request.num_computed_tokens] = engine.held(request.request_id)

    (cold,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=TOKENS, watch=watch)
    n = cold.prompt_tokens
    assert n in held
    for total, blocks in held.items():
        assert blocks == layout.held_blocks(n, total, BLOCK)

    oracle.layout, oracle.seed = layout, max(engine.state.seeds)
    tokens, logprobs = oracle.generate(DIGITS, [picture(1), picture(2)], TOKENS)
    kept = engine.kept(cold)
    if name == "adakv":
        assert len({len(kept[0, head]) for head in range(KV_HEADS)}) > 1, "the split is even"
    assert_same_kept(kept, {head: positions.numpy() for head, positions in oracle.kept.items()})
    assert cold.tokens == tokens
    np.testing.assert_allclose(cold.logprobs, logprobs, atol=1e-4)

    prompts = ask(HELLO, 1), ask(DIGITS, 1, 2), ask("<s>short")
    (cached,) = engine.generate(prompts[1], max_tokens=TOKENS)
    assert cached.cached_tokens == (n - WINDOW) // BLOCK * BLOCK
    engine.forget()
    preempted = False

    def preempt() -> None:
        nonlocal preempted
        running = engine.scheduler.running
        if not preempted and running and all(r.num_output_tokens > 1 for r in running):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            preempted = True

    others = engine.generate(*prompts, max_tokens=TOKENS, chunk=60, watch=preempt)
    assert preempted
    for answer in (cached, others[1]):
        assert_same(answer, cold)
        assert_same_kept(engine.kept(answer), kept)


def test_full_is_dense(engine: Engine) -> None:
    engine.use(make_layout(method="full"))
    (answer,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=2 * BLOCK)
    with pytest.raises(FileNotFoundError):
        engine.kept(answer)
    (again,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=TOKENS)
    assert again.cached_tokens == answer.prompt_tokens // BLOCK * BLOCK, "vLLM's own prefix cache"
    assert again.tokens == answer.tokens[:TOKENS]


def test_random_tokens_follow_what_is_asked(engine: Engine) -> None:
    """Not the request's name, place or time; other pictures are another question."""
    engine.use(make_layout(method="random"))
    same = [ask(HELLO, 1), ask(HELLO, 1), ask(HELLO, 2), ask(HELLO + "!", 1)]
    first, again, picture, text = map(engine.kept, engine.generate(*same, max_tokens=1))
    assert_same_kept(first, again)
    for other in (picture, text):
        assert any(not np.array_equal(other[head], first[head]) for head in first)


def test_kernels_decode_lengths_that_only_the_device_knows(engine: Engine) -> None:
    """The prompt is pruned by the twins: test_prune shows that kernels do the same."""
    engine.use(make_layout(method="adakv"))
    (theirs,) = engine.generate(ask(HELLO, 1), max_tokens=3)
    engine.forget()
    steps = 0

    def to_kernels() -> None:
        nonlocal steps
        steps += 1
        engine.state.ops = triton_ops

    (ours,) = engine.generate(ask(HELLO, 1), max_tokens=3, watch=to_kernels)
    assert steps > 2
    assert_same(ours, theirs)
