"""How `sparsemm check --run` judges answers, blocks and conditions: without an engine."""

from typing import Any

import pytest

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check.cases import (
    BUDGET,
    CASES,
    MAX_TOKENS,
    WINDOW,
    Seen,
    expected_blocks,
)
from sparsemm_vllm.commands.check.engine import Answer
from sparsemm_vllm.commands.check.judge import TOLERANCES, Reference, References, compare, judge
from sparsemm_vllm.commands.check.model import KV_HEADS, skewed_profile

EXACT = TOLERANCES["cpu", "float32"]


def answer(**changes: Any) -> Answer:
    values: dict[str, Any] = {"tokens": [7] * MAX_TOKENS, "logprobs": [-1.0] * MAX_TOKENS}
    return Answer("", 98, 0, gaps=[1.0] * MAX_TOKENS, **(values | changes))


def with_one(value: float, index: int = 5, usual: float = -1.0) -> list[float]:
    return [value if i == index else usual for i in range(MAX_TOKENS)]


@pytest.mark.parametrize(
    ("logprobs", "regrets", "problem"),
    [
        (with_one(-1.00009), with_one(0.00019, usual=0.0), None),
        (with_one(-1.0002), [0.0] * MAX_TOKENS, "the log-probability of token 6 differs by 0.0002"),
        (with_one(float("nan")), [0.0] * MAX_TOKENS, "the log-probability of token 6 differs"),
        ([-1.0] * MAX_TOKENS, with_one(0.0003, usual=0.0), "token 6 is 7, which is not the likeli"),
        ([-1.0] * MAX_TOKENS, with_one(float("nan"), usual=0.0), "token 6 is 7, which is not"),
    ],
)
def test_compare(logprobs: list[float], regrets: list[float], problem: str | None) -> None:
    _, found = compare(answer(), Reference(logprobs, regrets), EXACT)
    assert found == problem or str(found).startswith(str(problem))


def test_bfloat16_is_judged_by_its_median() -> None:
    tolerance = TOLERANCES["gpu", "bfloat16"]
    none = [0.0] * MAX_TOKENS
    assert compare(answer(), Reference(with_one(-2.5), none), tolerance)[1] is None
    far = [-1.3] * MAX_TOKENS
    assert "0.3 in the median" in str(compare(answer(), Reference(far, none), tolerance)[1])


def test_an_answer_that_is_too_short() -> None:
    (case,) = (case for case in CASES if case.name == "pruned, whole")
    layout = CacheLayout.from_scores(skewed_profile(layers=2).tensor(), KV_HEADS, BUDGET, WINDOW)
    seen = Seen([98], [0], expected_blocks(layout, 98), 0)
    references = Unasked(layout)
    row = judge(case, [answer(tokens=[7])], seen, references, EXACT)
    assert (row.status, row.finding) == ("differs", f"1 tokens instead of {MAX_TOKENS}")


@pytest.mark.parametrize("left", [0, 3])
def test_blocks_that_are_not_given_back(left: int) -> None:
    (case,) = (case for case in CASES if case.name == "several at once")
    count = len(case.requests)
    layout = CacheLayout.from_scores(skewed_profile(layers=2).tensor(), KV_HEADS, BUDGET, WINDOW)
    seen = Seen([162] * count, [0] * count, [20, left], 0)
    row = judge(case, [answer(tokens=[7])] * count, seen, Unasked(layout), EXACT)
    assert ("3 blocks are not given back" in row.finding) is bool(left)
    assert row.blocks == f"at most 20, {left}"


@pytest.mark.parametrize(
    ("name", "n", "cached", "preemptions", "fine"),
    [
        ("pruned, whole", 98, 0, 0, True),
        ("pruned, whole", 98, 16, 0, False),
        ("pruned, whole", 161, 0, 0, False),
        ("pruned, in chunks", 161, 0, 0, True),
        ("pruned, in chunks", 160, 0, 0, False),
        ("pruned, in chunks", 168, 0, 0, False),
        ("pruned, in chunks", 162, 64, 0, False),
        ("pruned, prefix hit", 162, 154, 0, True),
        ("pruned, prefix hit", 162, 155, 0, False),
        ("pruned, prefix hit", 162, 0, 0, False),
        ("several at once", 162, 0, 1, False),
        ("preempted, resumed", 162, 0, 0, False),
        ("preempted, resumed", 162, 0, 1, True),
    ],
)
def test_conditions(name: str, n: int, cached: int, preemptions: int, fine: bool) -> None:
    (case,) = (case for case in CASES if case.name == name)
    assert case.condition(Seen([n], [cached], [], preemptions))[0] is fine


def test_the_formula_of_blocks() -> None:
    """Seven prompt blocks and two compact ones; five are freed, and one is added at token 113."""
    layout = CacheLayout.from_scores(skewed_profile(layers=2).tensor(), KV_HEADS, BUDGET, WINDOW)
    assert expected_blocks(layout, 98) == [9, 4, 5, 0]
    assert expected_blocks(layout.dense, 98) == [7, 8, 0]


class Unasked(References):
    """References of which no test asks an answer."""

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
