"""Qwen2-VL and Qwen2.5-VL: as many tokens as the picture's size asks for, 2 x 2 patches each."""

from typing import Any

import numpy as np
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from .grid import Size, agree, cells, spans


def patches(config: Any, image_processor: Any, image_size: Size) -> np.ndarray:
    """Patches of the image tokens, ``[num_tokens, 4]``; see `Geometry`.

    Follows `_preprocess` of transformers' Qwen2VLImageProcessor: the picture is stretched to
    multiples of a merged patch (`smart_resize`), neither cropped nor padded. Tokens go row by row:
    the model undoes the order in which Qwen2.5-VL's windows take them.

    Raises:
        ValueError: one side is more than 200 times the other, the processor's settings are not the
            model's, or it does not resize and the size is no multiple of a merged patch.
    """
    vision = config.vision_config
    agree("patch_size", vision.patch_size, image_processor.patch_size)
    agree("merge_size", vision.spatial_merge_size, image_processor.merge_size)
    token = image_processor.patch_size * image_processor.merge_size
    width, height = resized = _resized(image_processor, image_size, token)
    if width % token or height % token:
        raise ValueError(f"{width} x {height} pixels are no multiple of {token}, without do_resize")
    axes = (
        spans(np.arange(0, pixels, token), token, pixels, original)
        for pixels, original in zip(resized, image_size, strict=True)
    )
    return cells(*axes).reshape(-1, 4)


def _resized(image_processor: Any, image_size: Size, token: int) -> Size:
    if not image_processor.do_resize:
        return image_size
    width, height = image_size
    least, most = (image_processor.size[edge] for edge in ("shortest_edge", "longest_edge"))
    height, width = smart_resize(height, width, token, min_pixels=least, max_pixels=most)
    return width, height
