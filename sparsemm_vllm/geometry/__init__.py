"""Which image tokens of a prompt show which part of a picture.

    geometry = image_tokens(config, processor, picture.size)
    geometry.covered((left, top, right, bottom))  # token indices; 0 is the picture's first token

One module per model family says how its processor and model turn a picture into tokens.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import llava, llava_next, qwen2_vl
from .grid import Box, Geometry, Size

__all__ = ["FAMILIES", "Box", "Geometry", "Size", "image_tokens"]

# By `model_type` of the model's config.
FAMILIES: dict[str, Callable[[Any, Any, Size], np.ndarray]] = {
    "llava": llava.patches,
    "llava_next": llava_next.patches,
    "qwen2_5_vl": qwen2_vl.patches,
    "qwen2_vl": qwen2_vl.patches,
}


def image_tokens(
    config: Any, processor: Any, image_size: Size, resized_to: Size | None = None
) -> Geometry:
    """The image tokens of one picture.

    Args:
        config: transformers config of the model (`AutoConfig`).
        processor: transformers processor of the model (`AutoProcessor`), or its image processor,
            with the settings that the engine uses (`mm_processor_kwargs`).
        image_size: width and height of the picture, in pixels. Boxes are given in these pixels.
        resized_to: width and height that the processor is given, in pixels, if the picture was
            resized before (as by `qwen_vl_utils.fetch_image`); none = `image_size`.

    Raises:
        ValueError: unknown family (`config.model_type`), a size that is not positive, or settings
            of the model or the processor that the family's module does not know.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"no image-token geometry for the model family {config.model_type!r}; "
            f"known: {', '.join(FAMILIES)}"
        )
    given = resized_to or image_size
    for width, height in (image_size, given):
        if width < 1 or height < 1:
            raise ValueError(f"a picture of {width} x {height} pixels has no image tokens")
    image_processor = getattr(processor, "image_processor", processor)
    patches = FAMILIES[config.model_type](config, image_processor, given)
    if given != image_size:
        scale = np.array(image_size) / np.array(given)
        # Rounded, so that a border on a whole pixel stays exactly on it.
        patches = np.round(patches * np.tile(scale, 2), 9)
    return Geometry(image_size, patches)
