"""Which patches of a picture show which character, and which lie in a box."""

import numpy as np

from sparsemm_vllm.data.pictures import Box, Page

from .vocabulary import BLANK, VOCAB

PATCH = 16  # pixels a side
MIN_OVERLAP = 24  # square pixels of a glyph's box that make a patch more than blank


def patch_glyphs(page: Page) -> np.ndarray:
    """Token id of the character each patch shows, ``[P]``: the one whose box covers most of it.

    A character that wins no patch takes the one it covers most, unless that is another's only one.
    """
    letters = [VOCAB[letter] for word in page.words for letter in word.text]
    boxes = [box for word in page.words for box in word.char_boxes]
    cover = patch_overlap(boxes, page.image.width // PATCH).reshape(len(boxes), -1)
    owner = np.where(cover.max(0) >= MIN_OVERLAP, cover.argmax(0), -1)
    for i in set(range(len(boxes))) - set(owner.tolist()):
        best = int(cover[i].argmax())
        if owner[best] < 0 or (owner == owner[best]).sum() > 1:
            owner[best] = i
    return np.array([*letters, BLANK])[owner]


def patch_overlap(boxes: list[Box], grid: int) -> np.ndarray:
    """Square pixels that each box shares with each patch, ``[boxes, grid, grid]`` (y, then x)."""
    edges = np.arange(grid) * PATCH
    x0, y0, x1, y1 = (np.array(side)[:, None] for side in zip(*boxes, strict=True))
    width = np.clip(np.minimum(x1, edges + PATCH) - np.maximum(x0, edges), 0, None)
    height = np.clip(np.minimum(y1, edges + PATCH) - np.maximum(y0, edges), 0, None)
    return height[:, :, None] * width[:, None, :]
