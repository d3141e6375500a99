"""Requests with settings of their own in vLLM's real engine: exact, together and alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError

from sparsemm_vllm.commands.check.oracle import Oracle
from sparsemm_vllm.engine.scheduler.stats import Outcome
from support.engines import (
    BLOCK,
    DIGITS,
    WINDOW,
    Answer,
    Engine,
    ask,
    assert_same,
    assert_same_kept,
    settings,
)
from support.tiny import picture

pytestmark = pytest.mark.engine

BUDGET, OWN = 40, 72  # of a prompt of 178 tokens
DENSE = {"sparsemm": 0}
PROMPT = ask(DIGITS, 1, 2)


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """With a pool in which half a dozen of these requests are preempted."""
    return Engine(
        model,
        settings(BUDGET, tmp_path_factory.mktemp("kept")),
        limit_mm_per_prompt={"image": 2},
        num_gpu_blocks_override=34,
        max_model_len=320,
    )


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.rest()


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, Answer]:
    """The same prompt with each kind of settings: cold, alone, in one chunk."""
    answers = {}
    for name, extra_args in (("dense", DENSE), ("own", {"sparsemm_budget": OWN}), ("", None)):
        (answers[name],) = engine.generate(PROMPT, max_tokens=60, extra_args=extra_args)
        engine.forget()
    return answers


def outcomes(engine: Engine) -> set[tuple[Outcome, int]]:
    return {(p.outcome, p.layout.base + WINDOW) for p in engine.manager.prompts.values()}


def test_a_budget_of_its_own_equals_transformers(
    engine: Engine, model: Path, alone: dict[str, Answer]
) -> None:
    oracle = Oracle(model, engine.layout.of_budget(OWN))
    tokens, logprobs = oracle.generate(DIGITS, [picture(1), picture(2)], max_tokens=60)
    assert alone["own"].tokens == tokens
    np.testing.assert_allclose(alone["own"].logprobs, logprobs, atol=1e-4)
    for head, positions in engine.kept(alone["own"]).items():
        np.testing.assert_array_equal(positions, oracle.kept[head].numpy())


def test_a_dense_request_equals_dense_attention(
    engine: Engine, model: Path, alone: dict[str, Answer]
) -> None:
    """A layout that prunes nothing, through the same oracle, which then prunes nothing either."""
    oracle = Oracle(model, engine.layout.dense)
    tokens, logprobs = oracle.generate(DIGITS, [picture(1), picture(2)], max_tokens=60)
    assert alone["dense"].tokens == tokens
    np.testing.assert_allclose(alone["dense"].logprobs, logprobs, atol=1e-4)


def test_the_settings_make_a_difference(alone: dict[str, Answer]) -> None:
    """Or nothing here would prove anything."""
    logprobs = [answer.logprobs for answer in alone.values()]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(np.subtract(logprobs[i], logprobs[j])).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "extra_args", "outcome", "budget"),
    [
        ("dense", DENSE, Outcome.OPTED_OUT, BUDGET),
        ("own", {"sparsemm_budget": OWN}, Outcome.PRUNED, OWN),
        ("", None, Outcome.PRUNED, BUDGET),
        ("own", {"sparsemm_budget": 80}, Outcome.PRUNED, 80),
        ("", {"sparsemm_budget": WINDOW + 1}, Outcome.PRUNED, WINDOW + 1),
    ],
)
def test_blocks_are_exact(
    engine: Engine,
    alone: dict[str, Answer],
    name: str,
    extra_args: dict[str, Any] | None,
    outcome: Outcome,
    budget: int,
) -> None:
    seen: set[int] = set()

    def watch() -> None:
        for request in engine.scheduler.running:
            n, total = request.num_prompt_tokens, request.num_computed_tokens
            assert outcomes(engine) == {(outcome, budget)}
            layout = engine.layout.dense if outcome is not Outcome.PRUNED else None
            layout = layout or engine.layout.of_budget(budget)
            held = engine.held(request.request_id)
            assert held == layout.held_blocks(n, total, BLOCK)
            seen.add(total)

    (answer,) = engine.generate(PROMPT, max_tokens=20, watch=watch, extra_args=extra_args)
    assert len(seen) >= 19
    if budget in (BUDGET, OWN):
        assert answer.tokens == alone[name].tokens[:20]


@pytest.mark.parametrize("chunk", [None, 50])
def test_together_cached_chunked_and_preempted_as_alone(
    engine: Engine, alone: dict[str, Answer], chunk: int | None
) -> None:
    """All kinds in one batch, prompts shared through the prefix cache, in a pool too small."""
    kinds: list[tuple[str, dict[str, Any] | None]] = [
        ("dense", DENSE),
        ("own", {"sparsemm_budget": OWN}),
        ("", None),
    ] * 2
    preempted: set[str] = set()
    together: set[tuple[Outcome, int]] = set()

    def watch() -> None:
        together.update(outcomes(engine))
        preempted.update(
            r.request_id for r in engine.scheduler.requests.values() if r.num_preemptions
        )

    answers = engine.generate(
        *[PROMPT] * len(kinds),
        max_tokens=60,
        chunk=chunk,
        watch=watch,
        extra_args=[extra_args for _, extra_args in kinds],
    )
    assert len(together) == 3
    assert preempted, "nothing was preempted: the pool is too large for this test"
    for answer, (name, _) in zip(answers, kinds, strict=True):
        assert_same(answer, alone[name])
        if name != "dense":
            assert_same_kept(engine.kept(answer), engine.kept(alone[name]))


def test_a_dense_answer_serves_a_next_turn_and_a_pruned_one_does_not(engine: Engine) -> None:
    cached, prompt = {}, [5 + i % 90 for i in range(6 * BLOCK)]
    for name, extra_args in (("dense", DENSE), ("pruned", None)):
        asked = {"prompt_token_ids": prompt}
        (first,) = engine.generate(asked, max_tokens=3 * BLOCK + 1, extra_args=extra_args)
        asked = {"prompt_token_ids": [*prompt, *first.tokens, 7, 8, 9, *range(20, 20 + WINDOW)]}
        (second,) = engine.generate(asked, max_tokens=1, extra_args=extra_args)
        cached[name] = second.cached_tokens - len(prompt)
        engine.forget()
    assert cached == {"dense": 3 * BLOCK, "pruned": 0}


@pytest.mark.parametrize("extra_args", [{"sparsemm": 7}, {"sparsemm_budget": 9999}])
def test_a_bad_request_never_reaches_the_engine(engine: Engine, extra_args: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match=next(iter(extra_args))):
        engine.generate(PROMPT, extra_args=extra_args)
    assert not engine.llm.llm_engine.has_unfinished_requests()
