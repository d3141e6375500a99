"""Answers of the engine against those of the masked reference, and blocks against the formula."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check.cases import (
    BUDGET,
    CASES,
    MAX_TOKENS,
    REFERENCE,
    Case,
    Request,
    Seen,
    expected_blocks,
)
from sparsemm_vllm.commands.check.engine import Answer
from sparsemm_vllm.commands.check.model import picture
from sparsemm_vllm.commands.check.oracle import Oracle
from sparsemm_vllm.commands.check.results import Row

VISIBLE = 0.5  # median difference that another budget must make, or equal answers prove nothing


@dataclass(frozen=True)
class Tolerance:
    """Differences of log-probabilities that rounding explains.

    Attributes:
        largest: bound of the difference at each token.
        median: bound of the median of an answer. A wrong budget moves it by 1 and more.
    """

    largest: float
    median: float


# In bfloat16 a head may keep one of two tokens whose scores are nearly equal, and the reference the
# other: a few tokens then differ by up to 1, and the median by 0.05 (measured with an engine on the
# CPU). Dense attention of float32 is rounded to TF32 on a GPU. No GPU has run this yet.
TOLERANCES = {
    ("cpu", "float32"): Tolerance(1e-4, 1e-4),
    ("gpu", "float32"): Tolerance(1e-2, 1e-3),
    ("gpu", "bfloat16"): Tolerance(2.0, 0.15),
}


class Reference(NamedTuple):
    """What the reference says to the tokens of an answer.

    Attributes:
        logprobs: log-probability of each token.
        regrets: log-probability that each token has less than the best one.
    """

    logprobs: Sequence[float]
    regrets: Sequence[float]


class References:
    """The masked reference, asked once for each answer.

    Args:
        model: folder of the model.
        layout: budgets of the server.
    """

    def __init__(self, model: Path, layout: CacheLayout) -> None:
        self.layout = layout
        self._oracle = Oracle(model, layout)
        self._known: dict[tuple[Request, tuple[int, ...]], Reference] = {}

    def greedy(self, request: Request) -> list[int]:
        """The tokens that the reference itself answers."""
        return self._ask(request, None)[0]

    def of(self, request: Request, tokens: Sequence[int]) -> Reference:
        """The log-probabilities that tokens should have as the answer to a request."""
        key = request, tuple(tokens)
        if key not in self._known:
            _, logprobs = self._ask(request, tokens)
            self._known[key] = Reference(logprobs, self._oracle.regrets)
        return self._known[key]

    def _ask(self, request: Request, tokens: Sequence[int] | None) -> tuple[list[int], list[float]]:
        self._oracle.layout = request.layout(self.layout)
        pictures = [picture(seed) for seed in request.pictures]
        return self._oracle.generate(request.text, pictures, MAX_TOKENS, forced=tokens)


def judge_references(references: References) -> Row:
    """Whether another budget makes a difference that would be seen."""
    requests = {request for case in CASES for request in case.requests}
    least = math.inf
    for request in requests:
        if request.budget != BUDGET:
            tokens = references.greedy(request)
            usual = Request(request.text, request.pictures)
            own, other = (references.of(r, tokens).logprobs for r in (request, usual))
            least = min(least, float(np.median(np.abs(np.subtract(own, other)))))
    finding = f"budgets apart: {least:.2g}"
    return Row(name=REFERENCE, status="ok" if least > VISIBLE else "differs", finding=finding)


def judge(
    case: Case,
    answers: Sequence[Answer],
    seen: Seen,
    references: References,
    tolerance: Tolerance,
) -> Row:
    """Compare the answers to a case with its references, and the blocks with the formula.

    Args:
        case: requests that were served.
        answers: answers of the engine.
        seen: observations while they were served.
        references: reference that says what they should be.
        tolerance: differences that rounding explains.
    """
    problems, compared, largest = [], 0, 0.0
    for i, (request, answer) in enumerate(zip(case.requests, answers, strict=True)):
        if len(answer.tokens) == MAX_TOKENS:
            reference = references.of(request, answer.tokens)
            difference, problem = compare(answer, reference, tolerance)
            compared, largest = compared + MAX_TOKENS, max(largest, difference)
        else:
            problem = f"{len(answer.tokens)} tokens instead of {MAX_TOKENS}"
        if problem:
            problems.append(f"request {i + 1}: {problem}" if len(answers) > 1 else problem)
    if len(answers) == 1:
        held = ", ".join(map(str, seen.blocks))
        layout = case.requests[0].layout(references.layout)
        expected = expected_blocks(layout, seen.prompt_tokens[0])
        if seen.blocks[-len(expected) :] != expected:
            problems.append(f"blocks should be {', '.join(map(str, expected))}")
    else:
        held = f"at most {max(seen.blocks)}, {seen.blocks[-1]}"
        if seen.blocks[-1]:
            problems.append(f"{seen.blocks[-1]} blocks are not given back")
    fine, facts = case.condition(seen)
    if not fine:
        problems.append(f"not served as it should have been: {facts}")
    return Row(
        name=case.name,
        status="differs" if problems else "ok",
        tokens=compared,
        difference=largest,
        blocks=held,
        finding="; ".join(problems) or facts,
    )


def compare(answer: Answer, reference: Reference, tolerance: Tolerance) -> tuple[float, str | None]:
    """Compare an answer with what the reference says to the same tokens.

    The reference goes along with the answer's tokens, so that one that rounding chose between two
    equally likely ones does not change all tokens after it.

    Returns:
        The largest difference of a token's log-probabilities, and what is wrong, if anything.
    """
    differences = np.abs(np.subtract(answer.logprobs, reference.logprobs))
    largest, median = float(differences.max()), float(np.median(differences))
    for i, regret in enumerate(reference.regrets):
        if not regret <= 2 * tolerance.largest:  # both may be rounded; "not": NaN too
            return largest, f"token {i + 1} is {answer.tokens[i]}, which is not the likeliest"
    if not largest <= tolerance.largest:
        at = int(differences.argmax()) + 1
        return largest, f"the log-probability of token {at} differs by {largest:.2g}"
    if not median <= tolerance.median:
        return largest, f"log-probabilities differ by {median:.2g} in the median"
    return largest, None
