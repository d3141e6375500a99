"""What KV heads kept of a picture, drawn on the picture: shared by `demo` and `look`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparsemm_vllm.commands.figures import picture_axes

if TYPE_CHECKING:  # importing it imports triton, which must wait; see `prepare_process`
    from sparsemm_vllm.geometry import Geometry

Head = tuple[int, int]  # layer and head


@dataclass(frozen=True)
class KeptPicture:
    """A picture in a prompt, and what each KV head kept of the prompt.

    Attributes:
        image: picture, as the model was given it.
        geometry: part of the picture that each image token shows.
        positions: positions of the image tokens in the prompt, int64 ``[image tokens]``.
        prompt_tokens: length of the prompt, in tokens.
        window: observation window, in tokens.
        by_head: kept positions by (layer, KV head), the window not among them; empty if the budget
            covers the prompt and nothing was pruned.
    """

    image: Image.Image
    geometry: Geometry
    positions: np.ndarray
    prompt_tokens: int
    window: int
    by_head: dict[Head, np.ndarray]

    @property
    def pruned(self) -> bool:
        """Whether anything was pruned."""
        return bool(self.by_head)

    def mask_of(self, head: Head) -> np.ndarray:
        """Whether a KV head kept each image token, bool ``[image tokens]``."""
        if not self.pruned:
            return np.ones(len(self.positions), dtype=bool)
        in_window = self.positions >= self.prompt_tokens - self.window
        return np.isin(self.positions, self.by_head[head]) | in_window

    def share(self) -> np.ndarray:
        """Share of all KV heads that kept each image token, float64 ``[image tokens]``."""
        if not self.pruned:
            return np.ones(len(self.positions))
        return np.mean([self.mask_of(head) for head in self.by_head], axis=0)

    def tokens_of(self, head: Head) -> int:
        """Prompt tokens that a KV head keeps, window included."""
        return len(self.by_head[head]) + self.window if self.pruned else self.prompt_tokens


def show_pixels(axes: Any, pixels: np.ndarray, **options: Any) -> None:
    """Show pixels in their own coordinates, in which patches are drawn.

    Args:
        axes: axes to draw on.
        pixels: colours or values, ``[height, width, 3]`` or ``[height, width]``.
        options: options of `imshow`.
    """
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", **options)


def grey(image: Image.Image, strength: float) -> np.ndarray:
    """The picture without colours, washed out to a strength, uint8 ``[height, width, 3]``."""
    light = np.asarray(image.convert("L"), dtype=np.float64)
    return np.repeat((255 - strength * (255 - light))[..., None], 3, axis=2).astype(np.uint8)


def patch_inside(geometry: Geometry, token: int) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom of a token's patch inside the picture; none if it has no patch."""
    left, top, right, bottom = geometry.patches[token]
    width, height = geometry.image_size
    if np.isnan(left):  # a token that shows no part of the picture
        return None
    return max(left, 0), max(top, 0), min(right, width), min(bottom, height)


def token_map(geometry: Geometry, values: np.ndarray) -> np.ndarray:
    """Mean of the tokens' values at each pixel, 0 where no token shows it, ``[height, width]``."""
    width, height = geometry.image_size
    total, count = np.zeros((2, height, width))
    for token, value in enumerate(values):
        if (patch := patch_inside(geometry, token)) is not None:
            left, top, right, bottom = map(round, patch)
            total[top:bottom, left:right] += value
            count[top:bottom, left:right] += 1
    return total / np.maximum(count, 1)


def draw_kept(axes: Any, picture: KeptPicture, head: Head, title: str = "") -> None:
    """Draw the picture, washed out where a KV head kept no token of it.

    Args:
        axes: axes to draw on.
        picture: picture in its prompt.
        head: layer and KV head.
        title: title of the axes; the head itself if not given.
    """
    mask = picture.mask_of(head)
    shown = token_map(picture.geometry, mask)[..., None] > 0
    pixels = np.asarray(picture.image.convert("RGB"))
    show_pixels(axes, np.where(shown, pixels, grey(picture.image, 0.12)))
    where = f"layer {head[0]}, KV head {head[1]}"
    counts = f"{picture.tokens_of(head)} tokens, {mask.sum()} of the picture"
    picture_axes(axes, title or where, f"{where}:\n{counts}" if title else f"keeps {counts}")
