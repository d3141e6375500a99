"""What was seen of one answer: where visual heads looked, and what the pruned cache kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # importing it imports triton, which must wait; see `prepare_process`
    from sparsemm_vllm.geometry import Geometry


@dataclass(frozen=True)
class SaidWord:
    """A word of the answer.

    Attributes:
        text: of the word.
        looks: how often a head's largest weight fell on each image token, over the word's tokens
            and the visual heads, int64 ``[image tokens]``.
        elsewhere: how often it fell on something else than the picture.
    """

    text: str
    looks: np.ndarray
    elsewhere: int

    @property
    def on_picture(self) -> float:
        """Share of the looks that fell on the picture, 0 to 1."""
        total = int(self.looks.sum()) + self.elsewhere
        return int(self.looks.sum()) / total if total else 0.0


@dataclass(frozen=True)
class Sight:
    """One answer and its traces.

    Attributes:
        image: as the model was given it.
        question: asked of it.
        answer: of the model, from the pruned cache.
        words: of the answer, in its order.
        heads: the visual heads that were watched, (layer, query head), best first.
        kept: kept positions by (layer, KV head), the window not among them; empty if the budget
            covers the prompt and nothing was pruned.
        geometry: what part of the picture each image token shows.
        positions: of the image tokens in the prompt, int64 ``[image tokens]``.
        prompt_tokens: `n`.
        window: `W`, in tokens.
        group: query heads of a KV head, `G`.
        blocks: KV blocks that the request holds after pruning, and that it would hold dense.
    """

    image: Image.Image
    question: str
    answer: str
    words: list[SaidWord]
    heads: list[tuple[int, int]]
    kept: dict[tuple[int, int], np.ndarray]
    geometry: Geometry
    positions: np.ndarray
    prompt_tokens: int
    window: int
    group: int
    blocks: tuple[int, int]

    def kept_of(self, head: tuple[int, int]) -> np.ndarray:
        """Whether a KV head (layer, head) kept each image token, bool ``[image tokens]``."""
        if not self.kept:
            return np.ones(len(self.positions), dtype=bool)
        in_window = self.positions >= self.prompt_tokens - self.window
        return np.isin(self.positions, self.kept[head]) | in_window

    def kept_share(self) -> np.ndarray:
        """Share of all KV heads that kept each image token, float64 ``[image tokens]``."""
        if not self.kept:
            return np.ones(len(self.positions))
        return np.mean([self.kept_of(head) for head in self.kept], axis=0)

    def tokens_of(self, head: tuple[int, int]) -> int:
        """Prompt tokens that a KV head keeps, window included."""
        return len(self.kept[head]) + self.window if self.kept else self.prompt_tokens
