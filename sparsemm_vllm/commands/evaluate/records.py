"""From answers to numbers: means, intervals and differences from the dense cache."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sparsemm_vllm.commands.evaluate.engine import Result
from sparsemm_vllm.commands.evaluate.metrics import Marks, draw_pictures, interval
from sparsemm_vllm.commands.evaluate.points import DENSE, Point

KEPT_SHARE = 0.97  # of the dense accuracy, that a method should keep


@dataclass(frozen=True)
class Estimate:
    """A statistic with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Record:
    """What was found of one point, or of several draws of random heads together, in one task.

    Attributes:
        task: name of the task.
        curve: name that points with other budgets share; see `Point`.
        method, budget, redistribute, mask: values of the point; see `Point`.
        masked_heads: number of query heads that are silenced.
        engines: number of engines that the figures are means of.
        pictures: number of pictures that were asked about.
        prompt_tokens: tokens of a prompt, mean.
        kept_tokens: prompt tokens that a KV head keeps, the window included, mean.
        held_bytes: size of the KV blocks of a prompt after it was pruned, in bytes, mean.
        exact_words: share of the words of the true answers that are exactly right in their place.
        character_errors: edits for each character of the true answers.
        anls: similarity to the true answers, mean over pictures; see `anls`.
        change: differences of these three from the dense cache, by name, paired by picture.
    """

    task: str
    curve: str
    method: str
    budget: int | None
    redistribute: bool
    mask: str | None
    masked_heads: int
    engines: int
    pictures: int
    prompt_tokens: float
    kept_tokens: float
    held_bytes: float
    exact_words: Estimate
    character_errors: Estimate
    anls: Estimate
    change: dict[str, Estimate]


def make_records(truths: dict[str, list[str]], results: dict[Point, Result]) -> list[Record]:
    """Records of every task, in the order of the points; the draws of random heads as one.

    Args:
        truths: true answers by task.
        results: results by point; that of the dense cache is among them.
    """
    groups: dict[tuple[str, int | None], list[Point]] = {}
    for point in results:
        groups.setdefault((point.curve, point.budget), []).append(point)
    records = []
    for task, answers in truths.items():
        draws = draw_pictures(len(answers))
        dense = _Statistics.of(task, answers, [results[Point(DENSE)]], draws)
        for points in groups.values():
            found = [results[point] for point in points]
            statistics = _Statistics.of(task, answers, found, draws)
            records.append(_record(task, points, found, statistics, dense))
    return records


@dataclass(frozen=True)
class _Statistics:
    """Means over engines: of all pictures, and of each draw of them, ``[DRAWS]``."""

    values: dict[str, float]
    draws: dict[str, np.ndarray]

    @classmethod
    def of(
        cls, task: str, truths: list[str], results: Sequence[Result], draws: np.ndarray
    ) -> "_Statistics":
        marks = [Marks.of(truths, result.tasks[task].answers) for result in results]
        every = [one.statistics() for one in marks]
        drawn = [one.statistics(draws) for one in marks]
        return cls(
            {name: float(np.mean([one[name] for one in every])) for name in every[0]},
            {name: np.mean([one[name] for one in drawn], 0) for name in drawn[0]},
        )

    def estimate(self, name: str) -> Estimate:
        return Estimate(self.values[name], *interval(self.draws[name]))

    def change(self, name: str, other: "_Statistics") -> Estimate:
        value = self.values[name] - other.values[name]
        return Estimate(value, *interval(self.draws[name] - other.draws[name]))


def _record(
    task: str,
    points: Sequence[Point],
    results: Sequence[Result],
    statistics: _Statistics,
    dense: _Statistics,
) -> Record:
    point, found = points[0], [result.tasks[task] for result in results]
    return Record(
        task=task,
        curve=point.curve,
        method=point.method,
        budget=point.budget,
        redistribute=point.redistribute,
        mask=point.mask,
        masked_heads=len(point.heads),
        engines=len(results),
        pictures=len(found[0].answers),
        prompt_tokens=float(np.mean([one.prompt_tokens for one in found])),
        kept_tokens=float(np.mean([one.kept_tokens for one in found])),
        held_bytes=float(np.mean([one.held_bytes for one in found])),
        exact_words=statistics.estimate("exact_words"),
        character_errors=statistics.estimate("character_errors"),
        anls=statistics.estimate("anls"),
        change={name: statistics.change(name, dense) for name in statistics.values},
    )


def curves(records: Iterable[Record], task: str) -> dict[str, list[Record]]:
    """Records of a task with budgets, by curve, the smallest cache first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.task == task and record.budget is not None:
            found.setdefault(record.curve, []).append(record)
    return {name: sorted(curve, key=lambda r: r.held_bytes) for name, curve in found.items()}


def dense_record(records: Iterable[Record], task: str) -> Record:
    """The record of the dense cache."""
    return next(r for r in records if r.task == task and r.method == DENSE and r.mask is None)


def bytes_that_keep(curve: Sequence[Record], dense: Record, share: float = KEPT_SHARE) -> float:
    """Held bytes from which on a curve keeps a share of the dense share of exact words.

    Interpolated between the points, linearly in the logarithm of the bytes; the dense cache is the
    last point.
    """
    wanted = share * dense.exact_words.value
    points = [*curve, dense]
    for below, above in reversed(list(pairwise(points))):
        low, high = below.exact_words.value, above.exact_words.value
        if low < wanted:
            part = (wanted - low) / (high - low)
            return float(below.held_bytes ** (1 - part) * above.held_bytes**part)
    return points[0].held_bytes


def ablation(records: Iterable[Record], task: str) -> dict[str, Estimate]:
    """Change of exact words by silencing heads, by kind of mask."""
    return {
        record.mask: record.change["exact_words"]
        for record in records
        if record.task == task and record.mask is not None
    }
