"""What the model families share: patches as rectangles of the original picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Size = tuple[int, int]  # width, height in pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, half-open

BLANK = np.full(4, np.nan)  # the patch of a token that shows no part of the picture


@dataclass(frozen=True, eq=False)
class Geometry:
    """Which part of one picture each of its image tokens shows.

    Args:
        image_size: width and height of the picture, in pixels.
        patches: edges of each token's patch (left, top, right, bottom), in pixels of the picture
            and in the order of the tokens in the prompt, float64 ``[num_tokens, 4]``. A patch that
            shows padding reaches over the picture's edge. A token without a patch (a class token,
            the newline tokens of LLaVA-NeXT) has NaN.
    """

    image_size: Size
    patches: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Image tokens of the picture in the prompt, those without a patch included."""
        return len(self.patches)

    def covered(self, box: Box) -> np.ndarray:
        """Tokens whose patch and `box` share an area: ascending indices, int64 ``[count]``.

        What counts is where the patch lies. Resizing filters look a few pixels further, and the
        vision tower's attention mixes all patches: neither is counted. The result is empty where
        the model does not see the box, as outside of a centre crop.

        Args:
            box: edges of the box (left, top, right, bottom), in pixels of the picture; right and
                bottom are the first column and row that no longer belong to it.

        Raises:
            ValueError: the box is empty, or not wholly inside the picture.
        """
        left, top, right, bottom = box
        width, height = self.image_size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"box {tuple(box)} is empty or not inside the picture of {width} x {height} pixels"
            )
        x0, y0, x1, y1 = self.patches.T
        return np.flatnonzero((x0 < right) & (x1 > left) & (y0 < bottom) & (y1 > top))


def spans(starts: np.ndarray, patch: int, resized: int, original: int) -> np.ndarray:
    """Where patches begin and end along one axis, in pixels of the original, ``[count, 2]``.

    Args:
        starts: first pixel of each patch in the resized picture, int64 ``[count]``; outside of the
            picture where a patch shows padding.
        patch: length of a patch, in pixels of the resized picture.
        resized: length of the resized picture along this axis, in pixels.
        original: length of the original picture along this axis, in pixels.
    """
    # One rounding, of a quotient of integers: a border on a whole pixel is exactly on it.
    return np.stack([starts, starts + patch], axis=-1) * original / resized


def cells(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """All patches of a grid, row by row: spans ``[C, 2]`` and ``[R, 2]`` to ``[R, C, 4]``."""
    patches = np.empty((len(rows), len(columns), 4))
    patches[..., 0::2] = columns
    patches[..., 1::2] = rows[:, None]
    return patches


def select_features(config: Any, patches: np.ndarray) -> np.ndarray:
    """The patches of the tokens that the model takes from its vision tower for one view.

    The tower puts its class tokens first; the strategy "default" leaves out the first of all
    tokens, "full" takes all.

    Args:
        config: transformers config of a LLaVA or LLaVA-NeXT model.
        patches: edges of the patches of the view, in pixels of the picture, float64 ``[count, 4]``.
    """
    class_tokens = {"clip_vision_model": 1, "siglip_vision_model": 0}
    tower = config.vision_config.model_type
    if tower not in class_tokens:
        raise ValueError(
            f"no image-token geometry for the vision tower {tower!r} of {config.model_type}; "
            f"known: {', '.join(class_tokens)}"
        )
    blanks = np.tile(BLANK, (class_tokens[tower], 1))
    tokens = np.concatenate([blanks, patches])
    return tokens[1:] if config.vision_feature_select_strategy == "default" else tokens


def agree(what: str, model: object, processor: object) -> None:
    """Refuse a processor that prepares pictures for another model.

    Args:
        what: name of the setting, for the message.
        model: value in the model's config.
        processor: value in the processor's settings.
    """
    if model != processor:
        raise ValueError(f"{what}: {model} in the model's config, {processor} in its processor")
