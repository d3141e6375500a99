"""SPARSEMM in vLLM's real engine, on a tiny random LLaVA: exact, and really free."""

from pathlib import Path

import numpy as np
import pytest

from support.engines import (
    BLOCK,
    DIGITS,
    HELLO,
    WINDOW,
    Answer,
    Engine,
    ask,
    assert_close,
    assert_same,
    assert_same_kept,
    settings,
)
from support.tiny import make_llava, picture

pytestmark = pytest.mark.engine

BUDGET = 40  # of prompts of 98 and 178 tokens


@pytest.fixture(scope="module")
def dense(model: Path) -> Engine:
    return Engine(model, None, limit_mm_per_prompt={"image": 2})


@pytest.fixture(scope="module")
def sparse(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("kept")
    return Engine(model, settings(BUDGET, folder), limit_mm_per_prompt={"image": 2})


@pytest.fixture(autouse=True)
def _idle(request: pytest.FixtureRequest):
    """Every test starts with an empty prefix cache and leaves every block free."""
    yield
    for name in {"dense", "sparse"} & set(request.fixturenames):
        request.getfixturevalue(name).rest()


@pytest.fixture(scope="module")
def reference(sparse: Engine) -> tuple[Answer, Answer]:
    """Both prompts, cold, alone, each in one chunk."""
    answers = []
    for prompt in (ask(HELLO, 1), ask(DIGITS, 1, 2)):
        answers += sparse.generate(prompt)
        sparse.forget()
    return answers[0], answers[1]


def test_budget_that_covers_the_prompt_is_dense(model: Path, dense: Engine) -> None:
    prompts = ask(HELLO, 1), ask(DIGITS, 1, 2), ask("<s>no picture at all")
    covering = Engine(model, settings(300), limit_mm_per_prompt={"image": 2})
    for ours, theirs in zip(covering.generate(*prompts), dense.generate(*prompts), strict=True):
        assert_same(ours, theirs)
    assert covering.all_free()


def test_bfloat16_budget_that_covers_the_prompt_is_dense(model: Path) -> None:
    prompts = ask(HELLO, 1), ask(DIGITS, 1, 2)
    options = {"dtype": "bfloat16", "limit_mm_per_prompt": {"image": 2}}
    theirs = Engine(model, None, **options).generate(*prompts)
    for a, b in zip(
        Engine(model, settings(300), **options).generate(*prompts), theirs, strict=True
    ):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("query_heads", "kv_heads"),
    [(8, 4), (8, 8), (7, 1)],
    ids=["gqa", "mha", "mqa of 7"],
)
def test_pruned_answers_equal_transformers(query_heads: int, kv_heads: int, tmp_path: Path) -> None:
    from sparsemm_vllm.commands.check.oracle import Oracle
    from support.tiny import skewed_profile

    model = make_llava(tmp_path / "model", query_heads, kv_heads)
    profile = skewed_profile(query_heads=query_heads, kv_heads=kv_heads).model_dump(mode="json")
    engine = Engine(
        model,
        settings(BUDGET, tmp_path / "kept", profile=profile),
        limit_mm_per_prompt={"image": 2},
    )
    oracle = Oracle(model, engine.layout)
    lengths = np.array(engine.layout.kept_tokens(178))
    assert lengths.max() > 2 * lengths.min(), "the heads' budgets should differ"
    for text, seeds in ((HELLO, (1,)), (DIGITS, (1, 2))):
        (ours,) = engine.generate(ask(text, *seeds), max_tokens=20)
        tokens, logprobs = oracle.generate(text, [picture(s) for s in seeds], max_tokens=20)
        assert ours.tokens == tokens
        np.testing.assert_allclose(ours.logprobs, logprobs, atol=1e-4)
        for head, positions in engine.kept(ours).items():
            np.testing.assert_array_equal(positions, oracle.kept[head].numpy())


def test_small_budget_changes_the_answer(dense: Engine, reference: tuple[Answer, ...]) -> None:
    """Or nothing below would prove that pruning happened."""
    (full,) = dense.generate(ask(DIGITS, 1, 2))
    assert np.abs(np.subtract(full.logprobs, reference[1].logprobs)).max() > 1e-2


def test_held_blocks_equal_the_formula(sparse: Engine) -> None:
    seen: list[tuple[int, int]] = []

    def watch() -> None:
        for request in sparse.scheduler.running:
            n, P = request.num_prompt_tokens, BLOCK
            total = request.num_computed_tokens
            held = sparse.held(request.request_id)
            assert held == sparse.layout.held_blocks(n, total, P)
            seen.append((total - n, held))
        free = sparse.pool.get_num_free_blocks()
        held_by_all = sum(sparse.held(r.request_id) for r in sparse.scheduler.running)
        assert free + held_by_all + 1 == sparse.pool.num_gpu_blocks

    sparse.generate(ask(DIGITS, 1, 2), max_tokens=40, watch=watch)
    assert seen[0][0] == 0
    assert seen[0][1] < 6, "the step that prunes should free most of twelve blocks"
    assert seen[-1][0] > 2 * BLOCK, "decoding should have grown by blocks"


@pytest.mark.parametrize("tail", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, None])
def test_any_chunk_size(sparse: Engine, reference: tuple[Answer, ...], tail: int | None) -> None:
    """Chunks that would leave `tail` tokens for the last one; None: the smallest chunks allowed."""
    n = reference[1].prompt_tokens
    chunk = WINDOW + 1 if tail is None else n - tail
    (answer,) = sparse.generate(ask(DIGITS, 1, 2), chunk=chunk)
    assert_same(answer, reference[1])
    assert_same_kept(sparse.kept(answer), sparse.kept(reference[1]))


def test_prefix_hit(sparse: Engine, reference: tuple[Answer, ...]) -> None:
    sparse.generate(ask(DIGITS, 1, 2))
    (answer,) = sparse.generate(ask(DIGITS, 1, 2))
    n = answer.prompt_tokens
    assert answer.cached_tokens == (n - WINDOW) // BLOCK * BLOCK
    assert_same(answer, reference[1])
    assert_same_kept(sparse.kept(answer), sparse.kept(reference[1]))


def test_shared_image_prefix(sparse: Engine, reference: tuple[Answer, ...]) -> None:
    (cold,) = sparse.generate(ask("<s><image>and another question", 1))
    sparse.forget()
    sparse.generate(ask(HELLO, 1))
    (shared,) = sparse.generate(ask("<s><image>and another question", 1))
    assert shared.cached_tokens == 64  # the picture's tokens
    assert_same(shared, cold)
    assert_same_kept(sparse.kept(shared), sparse.kept(cold))


def test_together_as_alone(sparse: Engine, reference: tuple[Answer, ...]) -> None:
    """Different lengths, one batch: prompts are pruned while others decode."""
    prompts = [ask(HELLO, 1), ask(DIGITS, 1, 2), ask("<s>short"), ask(HELLO, 1)]
    (short,) = sparse.generate(prompts[2])
    for chunk in (None, 60):
        sparse.forget()
        answers = sparse.generate(*prompts, chunk=chunk)
        for answer, alone in zip(answers, (*reference, short, reference[0]), strict=True):
            assert_same(answer, alone)


def test_indices_are_reused(sparse: Engine, reference: tuple[Answer, ...]) -> None:
    """Twelve requests through eight places: pruned, unpruned and other prompts take turns."""
    texts = [ask(HELLO, 1), ask("<s>short"), ask(DIGITS, 1, 2)] * 4
    (short,) = sparse.generate(texts[1])
    alone = [reference[0], short, reference[1]] * 4
    for answer, expected in zip(sparse.generate(*texts), alone, strict=True):
        assert_same(answer, expected)


def test_generated_tokens_stay_out_of_the_prefix_cache(sparse: Engine) -> None:
    (first,) = sparse.generate(ask(DIGITS, 1, 2), max_tokens=40)
    tokenizer = sparse.llm.get_tokenizer()
    longer = DIGITS + tokenizer.decode(first.tokens) + "tell me more about this, please"
    (second,) = sparse.generate(ask(longer, 1, 2))
    assert second.prompt_tokens > first.prompt_tokens + BLOCK
    assert second.cached_tokens == first.prompt_tokens // BLOCK * BLOCK


def test_preempted_and_resumed(
    model: Path, tmp_path: Path, reference: tuple[Answer, ...], sparse: Engine
) -> None:
    """A pool too small for six requests: some are preempted and start over."""
    small = Engine(
        model,
        settings(BUDGET, tmp_path),
        limit_mm_per_prompt={"image": 2},
        num_gpu_blocks_override=34,
        max_model_len=320,
    )
    preempted: set[str] = set()

    def watch() -> None:
        preempted.update(
            r.request_id for r in small.scheduler.requests.values() if r.num_preemptions
        )

    prompts = [ask(HELLO, 1), ask(DIGITS, 1, 2)] * 3
    (hello,) = sparse.generate(prompts[0], max_tokens=50)
    (digits,) = sparse.generate(prompts[1], max_tokens=50)
    answers = small.generate(*prompts, max_tokens=50, watch=watch)
    assert preempted, "nothing was preempted: the pool is too large for this test"
    for answer, alone in zip(answers, [hello, digits] * 3, strict=True):
        assert_same(answer, alone)
        assert_same_kept(small.kept(answer), sparse.kept(alone))
    assert small.all_free()


def test_abort_frees_everything(sparse: Engine) -> None:
    engine = sparse.llm.llm_engine
    from vllm import SamplingParams

    for i in range(3):
        params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
        engine.add_request(f"abort-{i}", ask(DIGITS, 1, 2), params)
    for _ in range(5):
        engine.step()
    assert not sparse.all_free()
    engine.abort_request([f"abort-{i}" for i in range(3)])
    engine.step()
    assert sparse.all_free()
    assert not sparse.manager.prompts
    assert sparse.state.recorder is not None
    assert not sparse.state.recorder._layers
