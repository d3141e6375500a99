"""Accuracy against what the cache holds, for every method."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sparsemm_vllm.commands.evaluate.metrics import Marks, draw_pictures, interval
from sparsemm_vllm.commands.evaluate.records import KEPT_SHARE
from sparsemm_vllm.data.pictures import Task

from .model import OfflineModel
from .pruning import REDISTRIBUTED, held_tokens, shown_tokens
from .subjects import Questions, exact_words

OURS = "sparsemm"


@dataclass(frozen=True)
class Entry:
    """A curve: its label, the method, and the visual scores that it gets."""

    label: str
    method: str
    scores: Tensor


def entries(scores: Tensor, causal: Tensor | None) -> list[Entry]:
    """All methods, with the paper's scores and, if there are any, with causal ones."""
    plain = [
        "sparsemm",
        f"sparsemm{REDISTRIBUTED}",
        "snapkv",
        "pyramidkv",
        "adakv",
        "random",
        "random_heads",
    ]
    found = [Entry(method, method, scores) for method in plain]
    if causal is not None:
        found += [Entry(f"causal{end}", f"sparsemm{end}", causal) for end in ("", REDISTRIBUTED)]
    return found


def task_curves(
    model: OfflineModel, questions: Questions, task: Task, found: list[Entry], budgets: list[int]
) -> Iterator[dict[str, Any]]:
    """Measure one task; yields a record a point, the last of which sums up the task."""
    prompts = model.prompts(questions.samples, questions.contexts)
    draws = draw_pictures(len(questions.samples))
    token_bytes = model.L * model.Hkv * 2 * model.D * 2  # keys and values, float16

    def measure(shown: Tensor) -> tuple[Marks, dict[str, Any]]:
        marks = Marks.of(questions.answers, model.answer(prompts, shown, questions.answers))
        held = float(held_tokens(shown).mean())
        record: dict[str, Any] = {
            "held_tokens": round(held, 2),
            "held_bytes": round(held * token_bytes),
        }
        for name, value in marks.statistics().items():
            record[name] = round(float(value), 4)
            ends = interval(marks.statistics(draws)[name])
            record[f"{name}_95"] = [round(end, 4) for end in ends]
        return marks, record

    dense, record = measure(prompts.everything())
    yield {"task": task, "method": "full", **record}
    full_tokens = record["held_tokens"]
    needs: dict[str, np.ndarray] = {}
    summary: dict[str, Any] = {}
    for entry in found:
        points: list[tuple[float, Marks]] = []
        for budget in budgets:
            marks, record = measure(shown_tokens(prompts, entry.method, entry.scores, budget))
            points.append((record["held_tokens"], marks))
            yield {"task": task, "method": entry.label, "budget": budget, **record}
        needs[entry.label] = need = needed(points, (full_tokens, dense), draws)
        summary[entry.label] = {
            "held_tokens": round(float(need[0]), 2),
            "held_tokens_95": [round(x, 2) for x in interval(need[1:])],
            "held_bytes": round(float(need[0]) * token_bytes),
            "share_of_prompt": round(float(need[0]) / full_tokens, 3),
        }
    for label, need in needs.items():
        ratio = need / needs[OURS]
        summary[label]["times_sparsemm"] = round(float(ratio[0]), 2)
        summary[label]["times_sparsemm_95"] = [round(x, 2) for x in interval(ratio[1:])]
    yield {"task": task, "kept_share": KEPT_SHARE, "needed": summary}


def needed(
    points: list[tuple[float, Marks]], full: tuple[float, Marks], draws: np.ndarray
) -> np.ndarray:
    """Held tokens at which `KEPT_SHARE` of dense is kept: of the sample, then of each draw."""
    held = np.array([tokens for tokens, _ in [*points, full]])
    sample = np.array([[exact_words(marks)] for _, marks in [*points, full]])
    drawn = np.stack([exact_words(marks, draws) for _, marks in [*points, full]])
    curves = np.concatenate([sample, drawn], 1).T
    return np.array([crossing(held, curve, KEPT_SHARE * curve[-1]) for curve in curves])


def crossing(held: np.ndarray, accuracy: np.ndarray, threshold: float) -> float:
    """Smallest held size from which on a curve stays at the threshold or above.

    Interpolated between the points, linear in the logarithm of the size.

    Args:
        held: sizes of the points, ascending; the last is the dense cache.
        accuracy: accuracy at these sizes.
        threshold: accuracy that is asked for, at most the last one.
    """
    below = np.flatnonzero(accuracy < threshold)
    if len(below) == 0:
        return float(held[0])
    i = int(below[-1])
    share = (threshold - accuracy[i]) / (accuracy[i + 1] - accuracy[i])
    return float(np.exp((1 - share) * np.log(held[i]) + share * np.log(held[i + 1])))
