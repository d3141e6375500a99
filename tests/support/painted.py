"""Tiny models of the families whose image tokens tell which pixels they have seen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from sparsemm_vllm.geometry import Geometry, Size, image_tokens
from support.tiny import make_tokenizer

SIDE, PATCH = 56, 14  # pixels: 4 x 4 patches a view
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # LLaVA-NeXT's, of 336 pixels
SMALL = {"shortest_edge": 56 * 56, "longest_edge": 168 * 168}  # pixels: 4 to 36 tokens of Qwen's
TEXT = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Family:
    """A model with its processors: as shipped, and one that resizes by picking pixels."""

    config: Any
    model: Any
    processor: Any
    nearest: Any
    pixels_per_pixel: Callable[[Size, Any], float]  # of the picture to one of the coarsest view

    def inputs(self, image: Image.Image, processor: Any = None) -> Any:
        processor = processor or self.processor
        return processor(text=processor.image_token, images=image, return_tensors="pt")

    def features(self, image: Image.Image, processor: Any = None) -> torch.Tensor:
        """One feature per image token, each of its own patch only, ``[num_tokens, width]``."""
        inputs = self.inputs(image, processor)
        names = ("pixel_values", "image_sizes", "image_grid_thw")
        arguments = {name: inputs[name] for name in names if name in inputs}
        if self.config.model_type == "llava":
            arguments.pop("image_sizes", None)
        if "llava" in self.config.model_type:
            arguments |= {
                "vision_feature_layer": 0,  # the embeddings, before any attention
                "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
            }
        with torch.no_grad():
            return self.model.model.get_image_features(**arguments).pooler_output[0]

    def changed(self, size: Size, box: tuple[int, int, int, int], processor: Any = None) -> set:
        """Tokens that change when the box is painted white on black."""
        black, painted = Image.new("RGB", size), Image.new("RGB", size)
        painted.paste((255, 255, 255), box)
        before, after = (self.features(image, processor) for image in (black, painted))
        return set(torch.nonzero((before != after).any(dim=-1)).ravel().tolist())

    def placeholders(self, size: Size) -> int:
        inputs = self.inputs(Image.new("RGB", size))
        return int((inputs["input_ids"] == self.config.image_token_id).sum())

    def geometry(self, size: Size, processor: Any = None) -> Geometry:
        return image_tokens(self.config, processor or self.processor, size)


def build(
    folder: Path, model_class: Any, config: Any, make_processor: Callable, scale: Callable
) -> Family:
    """All parts as they are read from a model's folder."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    config.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    processor, nearest = (AutoProcessor.from_pretrained(folder) for _ in range(2))
    nearest.image_processor.resample = Image.Resampling.NEAREST
    return Family(AutoConfig.from_pretrained(folder), model, processor, nearest, scale)


def llava(folder: Path, image_processor: Any, tower: Any, strategy: str = "default") -> Family:
    clip = tower.model_type == "clip_vision_model"
    config = LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(**TEXT),
        image_token_index=4,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
    )

    def make_processor() -> LlavaProcessor:
        return LlavaProcessor(
            image_processor=image_processor,
            tokenizer=make_tokenizer(),
            patch_size=tower.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(clip),
        )

    def scale(size: Size, inputs: Any) -> float:
        return (max if image_processor.do_pad or not clip else min)(size) / tower.image_size

    return build(folder, LlavaForConditionalGeneration, config, make_processor, scale)


def llava_next(
    folder: Path, tower: Any, pinpoints: list[list[int]] = PINPOINTS, strategy: str = "default"
) -> Family:
    config = LlavaNextConfig(
        vision_config=tower,
        text_config=LlamaConfig(**TEXT),
        image_token_index=4,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
    )
    side = tower.image_size

    def make_processor() -> LlavaNextProcessor:
        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessor(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                image_grid_pinpoints=pinpoints,
            ),
            tokenizer=make_tokenizer(),
            patch_size=tower.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(tower.model_type == "clip_vision_model"),
        )

    def scale(size: Size, inputs: Any) -> float:
        return max(size) / side

    return build(folder, LlavaNextForConditionalGeneration, config, make_processor, scale)


def qwen(folder: Path, model_type: str, **image_settings: Any) -> Family:
    tower: dict[str, Any] = {"depth": 0, "num_heads": 2, "patch_size": PATCH}  # no layers
    if model_type == "qwen2_vl":
        tower |= {"embed_dim": 16, "hidden_size": 16}
        classes = Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    else:
        # Windows of 2 x 2 tokens: the model takes the tokens in another order and restores it.
        tower |= {"hidden_size": 16, "out_hidden_size": 16, "window_size": 4 * PATCH}
        classes = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    config_class, model_class, processor_class = classes
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    config = config_class(
        vision_config=tower,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )

    def make_processor() -> Any:
        return processor_class(
            image_processor=Qwen2VLImageProcessor(**{"size": SMALL, **image_settings}),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
        )

    def scale(size: Size, inputs: Any) -> float:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return max(size[0] / (columns * PATCH), size[1] / (rows * PATCH))

    return build(folder, model_class, config, make_processor, scale)


def clip_processor(kind: Any = CLIPImageProcessor, side: int = SIDE, **more: Any) -> Any:
    crop = {"height": side, "width": side}
    return kind(size={"shortest_edge": side}, crop_size=crop, **more)


MAKERS: dict[str, Callable[[Path], Family]] = {
    "llava-crop": lambda folder: llava(folder, clip_processor(), CLIPVisionConfig(**TOWER)),
    "llava-pad": lambda folder: llava(
        folder, clip_processor(LlavaImageProcessor, do_pad=True), CLIPVisionConfig(**TOWER)
    ),
    "llava-full": lambda folder: llava(folder, clip_processor(), CLIPVisionConfig(**TOWER), "full"),
    # 60 pixels are four patches of 14 and a rest that the tower leaves out.
    "llava-siglip": lambda folder: llava(
        folder,
        SiglipImageProcessor(size={"height": 60, "width": 60}),
        SiglipVisionConfig(**{**TOWER, "image_size": 60}),
        "full",
    ),
    "llava-siglip-default": lambda folder: llava(
        folder,
        SiglipImageProcessor(size={"height": SIDE, "width": SIDE}),
        SiglipVisionConfig(**TOWER),
    ),
    "llava_next": lambda folder: llava_next(folder, CLIPVisionConfig(**TOWER)),
    # An odd number of tokens a side, and 5 pixels between the patches of neighbouring tiles.
    "llava_next-siglip": lambda folder: llava_next(
        folder,
        SiglipVisionConfig(**{**TOWER, "image_size": 47}),
        [[47, 94], [94, 47], [94, 94], [141, 47]],
        "full",
    ),
    "qwen2_vl": lambda folder: qwen(folder, "qwen2_vl"),
    "qwen2_5_vl": lambda folder: qwen(folder, "qwen2_5_vl"),
}
