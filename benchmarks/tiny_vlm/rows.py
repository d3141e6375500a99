"""Training rows: one picture, several questions as branches that do not see each other."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from sparsemm_vllm.data.pictures import Page, Sample

from .glyphs import patch_glyphs
from .vocabulary import ASSISTANT, EOS, PAD, encode

IGNORE = -100  # label of a position without a loss
Branch = tuple[list[int], list[int]]  # ids of a question and of its answer


@dataclass(frozen=True)
class Row:
    """Ids, labels (already shifted), positions and segments, ``[T]`` each.

    Segment 0 is what all branches see, 1 and on are the branches, -1 is padding.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    image: int  # column of the first image token


def pack_row(
    prefix: list[int], image: int, branches: Iterable[Branch], T: int, gap: int = 0
) -> Row:
    """A row of the prefix and as many of the branches, in their order, as fit.

    The positions of a branch are as if it came alone, ``gap`` further on.
    """
    ids, labels = np.full(T, PAD), np.full(T, IGNORE)
    positions, segments = np.zeros(T, dtype=np.int64), np.full(T, -1)
    start = len(prefix)
    ids[:start], positions[:start], segments[:start] = prefix, np.arange(start), 0
    for branch, (prompt, answer) in enumerate(branches, 1):
        stop = start + len(prompt) + len(answer)
        if stop > T:
            break
        ids[start:stop] = prompt + answer
        labels[stop - len(answer) - 1 : stop - 1] = answer
        positions[start:stop] = len(prefix) + gap + np.arange(stop - start)
        segments[start:stop] = branch
        start = stop
    return Row(ids, labels, positions, segments, image)


def branch(sample: Sample, before: str = "") -> Branch:
    """A sample's question, after the picture and some text, and its answer."""
    return [*encode(f"\n{before}{sample.question}"), ASSISTANT], [*encode(sample.answer), EOS]


@dataclass(frozen=True)
class Batch:
    """``ids``, ``labels``, ``positions``, ``segments [B, T]``, ``image [B]``; ``glyphs [B, P]``;
    pixels NCHW in -1..1.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    image: Tensor
    glyphs: Tensor
    pixels: Tensor

    @classmethod
    def of(cls, rows: list[Row], pages: list[Page]) -> "Batch":
        stacked = default_collate([vars(row) for row in rows])
        pixels = default_collate([np.array(page.image) for page in pages])
        return cls(
            **stacked,
            glyphs=default_collate([patch_glyphs(page) for page in pages]),
            pixels=pixels.permute(0, 3, 1, 2) / 127.5 - 1,
        )

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def branch_sight(segments: Tensor) -> Tensor:
    """Which keys (last) a query sees, bool ``[B, T, T]``: earlier ones, of its branch or shared."""
    same = segments[:, :, None] == segments[:, None, :]
    shared = segments[:, None, :] == 0
    row = torch.arange(segments.shape[1], device=segments.device)
    return (same | shared) & (row[:, None] >= row)
