"""What was seen of one answer: where visual heads looked, and what the pruned cache kept."""

from dataclasses import dataclass

import numpy as np

from sparsemm_vllm.budget.plan import Blocks
from sparsemm_vllm.commands.kept_map import Head, KeptPicture


@dataclass(frozen=True)
class SaidWord:
    """A word of the answer.

    Attributes:
        text: word, as it was said.
        looks: number of times that a head's largest weight fell on each image token, over the
            word's tokens and the visual heads, int64 ``[image tokens]``.
        elsewhere: number of times that it fell on something else than the picture.
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
        kept: picture in its prompt, and what the pruned cache kept of it.
        question: text beside the picture.
        answer: text that the model said, from the pruned cache.
        words: words of the answer, in its order.
        heads: visual heads that were watched, (layer, query head), best first.
        group: query heads of a KV head.
        blocks: numbers of KV blocks that the prompt holds.
    """

    kept: KeptPicture
    question: str
    answer: str
    words: list[SaidWord]
    heads: list[Head]
    group: int
    blocks: Blocks
