"""How right answers are, picture by picture, and how sure that is: intervals by bootstrap."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVELS = (2.5, 97.5)  # percentiles of a 95 % interval
ANLS_THRESHOLD = 0.5


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, in characters."""
    codes = np.array([ord(character) for character in b])
    steps = np.arange(len(b) + 1)
    row = steps
    for i, character in enumerate(a, 1):
        replaced_or_deleted = np.minimum(row[:-1] + (codes != ord(character)), row[1:] + 1)
        # Insertions: each of them costs one, from any place further left.
        row = np.minimum.accumulate(np.append(i, replaced_or_deleted) - steps) + steps
    return int(row[-1])


def words_right(truth: str, answer: str) -> int:
    """Words of the truth that the answer says exactly, in their place."""
    return sum(a == b for a, b in zip(truth.split(), answer.split(), strict=False))


def anls(truths: Sequence[str], answer: str) -> float:
    """Normalised Levenshtein similarity to the nearest truth, 0 to 1; 0 if it is below a half.

    Regardless of case and of spaces at both ends. The mean over all questions is DocVQA's measure,
    ANLS. Source: Biten et al., Scene Text Visual Question Answering, ICCV 2019,
    https://arxiv.org/abs/1905.13648, equation 1, with its threshold of 0.5.

    Args:
        truths: accepted answers, at least one.
        answer: answer of the model.
    """
    return max(_similarity(truth.strip().lower(), answer.strip().lower()) for truth in truths)


def _similarity(truth: str, answer: str) -> float:
    distance = edit_distance(truth, answer) / max(len(truth), len(answer), 1)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


@dataclass(frozen=True)
class Marks:
    """Marks of the answers to pictures, float64 ``[N]`` each.

    Attributes:
        right: number of words that are exactly right, in their place.
        words: number of words in the true answer.
        errors: number of edits from the answer to the true one, in characters.
        characters: number of characters in the true answer.
        anls: similarity to the true answer, 0 to 1; see `anls`.
    """

    right: np.ndarray
    words: np.ndarray
    errors: np.ndarray
    characters: np.ndarray
    anls: np.ndarray

    @classmethod
    def of(cls, truths: Sequence[str], answers: Sequence[str]) -> "Marks":
        """Mark answers; blanks at both ends do not count."""
        marks = [
            (
                words_right(truth, answer),
                len(truth.split()),
                edit_distance(truth, answer.strip()),
                len(truth),
                anls([truth], answer),
            )
            for truth, answer in zip(truths, answers, strict=True)
        ]
        return cls(*np.array(marks, dtype=np.float64).reshape(-1, 5).T)

    def statistics(self, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Shares over all pictures, or over each draw of them: ``[]``, or ``[draws]``.

        Args:
            draws: indices of pictures, ``[draws, N]``.

        Returns:
            By name: exact words per word, character errors per character, mean ANLS.
        """
        every = np.arange(len(self.words)) if draws is None else draws
        return {
            "exact_words": self.right[every].sum(-1) / self.words[every].sum(-1),
            "character_errors": self.errors[every].sum(-1) / self.characters[every].sum(-1),
            "anls": self.anls[every].mean(-1),
        }


def draw_pictures(pictures: int, seed: int = 0) -> np.ndarray:
    """Bootstrap: pictures drawn with replacement, int64 ``[DRAWS, pictures]``.

    The same draws for every point, so that differences between points are paired.
    """
    return np.random.default_rng(seed).integers(pictures, size=(DRAWS, pictures))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a statistic's draws."""
    low, high = np.percentile(values, LEVELS)
    return float(low), float(high)
