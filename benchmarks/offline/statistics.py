"""Means over pictures with bootstrap intervals, and where a curve crosses a share of dense."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tiny_vlm.accuracy import score_answer

from sparsemm_vllm.pictures import Sample

DRAWS = 2000
LEVELS = (2.5, 97.5)  # percentiles of a 95 % interval


@dataclass(frozen=True)
class Marks:
    """Per picture, ``[N]``: words exactly right, words, character errors, characters."""

    right: np.ndarray
    words: np.ndarray
    errors: np.ndarray
    characters: np.ndarray

    @classmethod
    def of(cls, samples: list[Sample], answers: list[str]) -> Marks:
        marks = [score_answer(s.answer, a) for s, a in zip(samples, answers, strict=True)]
        return cls(*np.array(marks).T)

    def exact(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Share of words exactly right, of all pictures or of each draw ``rows [draws, N]``."""
        return _ratio(self.right, self.words, rows)

    def character_errors(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Character errors per character; as `exact`."""
        return _ratio(self.errors, self.characters, rows)


def _ratio(above: np.ndarray, below: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    if rows is None:
        return above.sum() / below.sum()
    return above[rows].sum(1) / below[rows].sum(1)


def bootstrap_rows(pictures: int, seed: int = 0) -> np.ndarray:
    """Pictures drawn with replacement, ``[DRAWS, pictures]``: the same draws for every method."""
    return np.random.default_rng(seed).integers(pictures, size=(DRAWS, pictures))


def interval(draws: np.ndarray) -> list[float]:
    """Ends of the 95 % interval of a statistic's draws."""
    return [float(level) for level in np.percentile(draws, LEVELS)]


def crossing(held: np.ndarray, accuracy: np.ndarray, threshold: float) -> float:
    """Smallest held size from which on a curve stays at the threshold or above.

    Interpolated between the points, linear in the logarithm of the size.

    Args:
        held: ascending sizes of the points; the last is the dense cache.
        accuracy: at these sizes.
        threshold: at most the last accuracy.
    """
    below = np.flatnonzero(accuracy < threshold)
    if len(below) == 0:
        return float(held[0])
    i = int(below[-1])
    share = (threshold - accuracy[i]) / (accuracy[i + 1] - accuracy[i])
    return float(np.exp((1 - share) * np.log(held[i]) + share * np.log(held[i + 1])))
