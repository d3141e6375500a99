"""Models, sizes, boxes and settings whose image tokens are not known."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    SiglipVisionConfig,
)

from sparsemm_vllm.geometry import Box, Size, image_tokens
from support.painted import PINPOINTS, SIDE, TEXT, TOWER, Family, clip_processor


def test_unknown_families_are_refused() -> None:
    known = "known: llava, llava_next, qwen2_5_vl, qwen2_vl"
    with pytest.raises(ValueError, match=f"family 'llama'; {known}"):
        image_tokens(LlamaConfig(**TEXT), None, (56, 56))


@pytest.mark.parametrize("sizes", [((0, 5), None), ((5, -1), None), ((5, 5), (0, 5))])
def test_sizes_that_are_not_positive_are_refused(
    families: Callable[[str], Family], sizes: tuple[Size, Size | None]
) -> None:
    family = families("qwen2_vl")
    with pytest.raises(ValueError, match="pixels has no image tokens"):
        image_tokens(family.config, family.processor, *sizes)


def test_elongated_pictures_are_refused_by_qwen(families: Callable[[str], Family]) -> None:
    assert families("qwen2_vl").geometry((200, 1)).num_tokens > 0
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        families("qwen2_vl").geometry((201, 1))


@pytest.mark.parametrize(
    "box",
    [
        (3, 0, 3, 5),  # empty
        (0, 5, 5, 4),
        (-1, 0, 5, 5),  # reaching over each edge
        (0, -0.5, 5, 5),
        (0, 0, 101, 5),
        (0, 0, 5, 76),
        (200, 200, 300, 300),
        (0, 0, float("nan"), 5),
    ],
)
def test_boxes_outside_the_picture_are_refused(families: Callable[[str], Family], box: Box) -> None:
    with pytest.raises(ValueError, match="empty or not inside the picture of 100 x 75 pixels"):
        families("llava-crop").geometry((100, 75)).covered(box)


CLIP, SIGLIP = CLIPVisionConfig(**TOWER), SiglipVisionConfig(**TOWER)
NEXT = {
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_grid_pinpoints": PINPOINTS,
}


@pytest.mark.parametrize(
    ("config", "processor", "reason"),
    [
        (
            LlavaConfig(vision_config={"model_type": "pixtral"}),
            clip_processor(side=1024),
            "vision tower 'pixtral' of llava; known: clip_vision_model, siglip_vision_model",
        ),
        (
            LlavaConfig(vision_config=CLIP),
            clip_processor(side=112),
            r"size of a view: \(56, 56\) in the model's config, \(112, 112\) in its processor",
        ),
        (LlavaConfig(vision_config=CLIP), clip_processor(do_resize=False), "crop .* is larger"),
        (LlavaConfig(vision_config=CLIP), clip_processor(do_center_crop=False), "size of a view"),
        (LlavaConfig(vision_config=CLIP), clip_processor(do_pad=True), "do_pad of CLIP"),
        (
            LlavaConfig(vision_config=CLIP),
            CLIPImageProcessor(size={"shortest_edge": SIDE, "longest_edge": SIDE}),
            "size of the image processor: .* is not known",
        ),
        (
            LlavaNextConfig(vision_config=CLIP, image_grid_pinpoints=PINPOINTS),
            LlavaNextImageProcessor(**NEXT | {"size": {"height": 112, "width": SIDE}}),
            "size of the base view",
        ),
        (
            LlavaNextConfig(vision_config=CLIP, image_grid_pinpoints=PINPOINTS),
            LlavaNextImageProcessor(**NEXT | {"crop_size": {"height": SIDE, "width": 112}}),
            "size of a tile",
        ),
        (
            LlavaNextConfig(vision_config=CLIP, image_grid_pinpoints=PINPOINTS[1:]),
            LlavaNextImageProcessor(**NEXT),
            "image_grid_pinpoints",
        ),
        *(
            (
                LlavaNextConfig(
                    vision_config=tower,
                    image_grid_pinpoints=PINPOINTS,
                    vision_feature_select_strategy=strategy,
                ),
                LlavaNextImageProcessor(**NEXT),
                f"no square with vision_feature_select_strategy '{strategy}'",
            )
            for tower, strategy in ((CLIP, "full"), (SIGLIP, "default"))
        ),
        (Qwen2VLConfig(), Qwen2VLImageProcessor(patch_size=16), "patch_size: 14 in the model's"),
        (Qwen2VLConfig(), Qwen2VLImageProcessor(merge_size=4), "merge_size: 2 in the model's"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_settings_that_do_not_fit_are_refused(config: Any, processor: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        image_tokens(config, processor, (50, 40))
