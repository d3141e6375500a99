"""How far scores would be the same on other samples."""

import math

import numpy as np

WANTED = 0.9  # rank correlation of two halves that scores should have


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on, equal values sharing their mean: float64, of the same size."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation of two vectors; none if one of them is constant."""
    x, y = ranks(a.ravel()), ranks(b.ravel())
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1].clip(-1, 1))


def split_half(hits: np.ndarray) -> float | None:
    """Rank correlation of the mean scores of two halves of the samples, drawn at random.

    Args:
        hits: hits of each head, ``[samples, L, Hq]``.

    Returns:
        None for a single sample, or a half without any hit.
    """
    count = len(hits)
    if count < 2:
        return None
    order = np.random.default_rng(0).permutation(count)
    return spearman(hits[order[: count // 2]].mean(0), hits[order[count // 2 :]].mean(0))


def samples_missing(samples: int, correlation: float, wanted: float = WANTED) -> int | None:
    """How many more samples would bring the halves' correlation to `wanted`.

    Spearman-Brown: the correlation of scores from k times as many samples is
    ``k r / (1 + (k - 1) r)``. Source: Brown (1910), Some experimental results in the correlation of
    mental abilities.

    Args:
        samples: number of samples that were measured.
        correlation: rank correlation of their two halves, -1 to 1.
        wanted: rank correlation that two halves should have.

    Returns:
        None if no number would: the halves have nothing in common.
    """
    if correlation <= 0:
        return None
    factor = wanted * (1 - correlation) / (correlation * (1 - wanted))
    return max(0, math.ceil(round(samples * (factor - 1), 6)))
