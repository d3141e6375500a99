"""Accuracy against what the cache holds, for every method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sparsemm_vllm.pictures import Task

from .model import OfflineModel
from .pruning import REDISTRIBUTED, held_tokens, shown_tokens
from .statistics import Marks, bootstrap_rows, crossing, interval
from .subjects import Questions

KEPT_SHARE = 0.97  # of the dense accuracy
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
    rows = bootstrap_rows(len(questions.samples))
    token_bytes = model.L * model.Hkv * 2 * model.D * 2  # keys and values, float16

    def measure(shown: Tensor) -> tuple[Marks, dict[str, Any]]:
        marks = Marks.of(questions.samples, model.answer(prompts, shown, questions.answers))
        held = float(held_tokens(shown).mean())
        return marks, {
            "held_tokens": round(held, 2),
            "held_bytes": round(held * token_bytes),
            "exact_words": round(float(marks.exact()), 4),
            "exact_words_95": [round(x, 4) for x in interval(marks.exact(rows))],
            "character_errors": round(float(marks.character_errors()), 4),
            "character_errors_95": [round(x, 4) for x in interval(marks.character_errors(rows))],
        }

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
        needs[entry.label] = need = needed(points, (full_tokens, dense), rows)
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
    points: list[tuple[float, Marks]], full: tuple[float, Marks], rows: np.ndarray
) -> np.ndarray:
    """Held tokens at which `KEPT_SHARE` of dense is kept: of the sample, then of each draw."""
    held = np.array([tokens for tokens, _ in [*points, full]])
    draws = np.stack([marks.exact(rows) for _, marks in [*points, full]])
    sample = np.array([[float(marks.exact())] for _, marks in [*points, full]])
    curves = np.concatenate([sample, draws], 1).T
    return np.array([crossing(held, curve, KEPT_SHARE * curve[-1]) for curve in curves])
