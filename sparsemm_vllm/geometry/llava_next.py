"""LLaVA-NeXT (1.6): the whole picture in one base view, and again in finer tiles."""

import math
from typing import Any

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from .grid import BLANK, Size, agree, cells, select_features, spans


def patches(config: Any, image_processor: Any, image_size: Size) -> np.ndarray:
    """Patches of the image tokens, ``[num_tokens, 4]``; see `Geometry`.

    The tokens are those of the base view, row by row; then the rows of all tiles put together, each
    row followed by a newline token. Follows `_get_image_patches` of transformers'
    LlavaNextImageProcessor and `pack_image_features` of its LlavaNextModel:

    * The base view is the picture stretched to a square.
    * For the tiles the picture is resized, in its proportions, into the best of the configured
      resolutions and padded to it at the centre.
    * Rows or columns of tokens that the model takes for padding are left out, as many on each side.
      It counts them in whole tokens, so a half-padded token may stay, and a strip of up to half
      a patch at the picture's edge may be seen in the base view only.

    Raises:
        ValueError: unknown vision tower or strategy, or the processor's settings are not the
            model's.
    """
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    size, crop = image_processor.size, image_processor.crop_size
    short = size.get("shortest_edge")
    agree("size of the base view", [side] * 2, [size.get(k, short) for k in ("width", "height")])
    agree("size of a tile", [side] * 2, [crop["width"], crop["height"]])
    pinpoints = [list(p) for p in config.image_grid_pinpoints]
    agree(
        "image_grid_pinpoints", pinpoints, [list(p) for p in image_processor.image_grid_pinpoints]
    )

    starts = np.arange(side // patch) * patch
    whole = cells(*(spans(starts, patch, side, original) for original in image_size))
    base = select_features(config, whole.reshape(-1, 4))
    if len(base) != len(starts) ** 2:
        raise ValueError(
            "the tokens of a tile are no square with vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r} and {config.vision_config.model_type}"
        )

    height, width = select_best_resolution(image_size[::-1], pinpoints)
    canvas = width, height
    resized = _resized(image_size, canvas)
    grid = [len(starts) * (pixels // side) for pixels in canvas]  # tokens a row, rows
    axes = []
    for k, hidden in enumerate(_hidden(image_size, grid)):
        margin = (canvas[k] - resized[k]) // 2
        corners = np.arange(canvas[k] // side)[:, None] * side
        shown = (corners + starts).ravel()[hidden : grid[k] - hidden]
        axes.append(spans(shown - margin, patch, resized[k], image_size[k]))
    tiles = cells(*axes)
    newlines = np.tile(BLANK, (len(tiles), 1, 1))
    return np.concatenate([base, np.concatenate([tiles, newlines], axis=1).reshape(-1, 4)])


def _resized(image_size: Size, canvas: Size) -> Size:
    """Size of the picture on the canvas of all tiles (`get_patch_output_size`)."""
    scales = canvas[0] / image_size[0], canvas[1] / image_size[1]
    if scales[0] < scales[1]:
        return canvas[0], min(math.ceil(image_size[1] * scales[0]), canvas[1])
    return min(math.ceil(image_size[0] * scales[1]), canvas[0]), canvas[1]


def _hidden(image_size: Size, grid: list[int]) -> tuple[int, int]:
    """Columns and rows of tokens left out at either side (`unpad_image`)."""
    (width, height), (columns, rows) = image_size, grid
    if width / height > columns / rows:
        return 0, (rows - int(round(height * (columns / width), 7))) // 2
    return (columns - int(round(width * (rows / height), 7))) // 2, 0
