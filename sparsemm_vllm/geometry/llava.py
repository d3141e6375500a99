"""LLaVA-1.5: one square view, made by padding or by a centre crop, as the processor is set."""

from typing import Any

import numpy as np

from .grid import Size, agree, cells, select_features, spans


def patches(config: Any, image_processor: Any, image_size: Size) -> np.ndarray:
    """Patches of the image tokens, ``[num_tokens, 4]``; see `Geometry`.

    Follows `_preprocess` of transformers' CLIPImageProcessor, SiglipImageProcessor and
    LlavaImageProcessor: the picture is padded to a square (only by the last, if `do_pad`), resized
    (if `do_resize`), cropped at the centre (if `do_center_crop`). The tower then cuts the view into
    patches, row by row, and leaves out what is no whole patch.

    Raises:
        ValueError: unknown vision tower or setting, or the view is not what the tower expects.
    """
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    square = _pads_to_square(image_processor)
    padded = (max(image_size),) * 2 if square else image_size
    resized = _resized(image_processor, padded)
    view = _cropped(image_processor, resized)
    agree("size of a view", (side, side), view)

    axes = []
    for k in range(2):
        start = (resized[k] - view[k]) // 2  # of the crop
        margin = (padded[k] - image_size[k]) // 2  # of the padding
        starts = start + np.arange(side // patch) * patch
        axes.append(spans(starts, patch, resized[k], padded[k]) - margin)
    return select_features(config, cells(*axes).reshape(-1, 4))


def _pads_to_square(image_processor: Any) -> bool:
    if not getattr(image_processor, "do_pad", None):
        return False
    if not hasattr(image_processor, "pad_to_square"):
        raise ValueError(f"do_pad of {type(image_processor).__name__} is not known")
    return True


def _resized(image_processor: Any, image_size: Size) -> Size:
    if not image_processor.do_resize:
        return image_size
    match dict(image_processor.size):
        case {"height": height, "width": width, **rest} if not rest:
            return width, height
        case {"shortest_edge": edge, **rest} if not rest:
            width, height = image_size
            # As get_resize_output_image_size of transformers rounds it.
            longest = int(edge * max(image_size) / min(image_size))
            return (edge, longest) if width <= height else (longest, edge)
        case size:
            raise ValueError(f"size of the image processor: {size} is not known")


def _cropped(image_processor: Any, resized: Size) -> Size:
    if not getattr(image_processor, "do_center_crop", None):
        return resized
    crop = image_processor.crop_size["width"], image_processor.crop_size["height"]
    if crop[0] > resized[0] or crop[1] > resized[1]:
        raise ValueError(f"the crop of {crop} pixels is larger than the resized picture, {resized}")
    return crop
