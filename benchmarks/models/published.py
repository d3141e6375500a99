"""The numbers of the published models, in the classes of transformers that hold them.

Where transformers' defaults are a model's own, they are not repeated here; the tests compare what
follows from all of them. All are bfloat16, so that they can be laid side by side. The Vicunas end
at 4,096 positions: for longer prompts give vLLM the ``hf_overrides``
``{"text_config": {"max_position_embeddings": tokens}}``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from .chat_templates import MISTRAL, QWEN, VICUNA

LLAVA_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
LLAVA_ROLES = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
}
# In the order of their ids, from 151643 on.
QWEN_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
)
QWEN_TOKENS = {token: 151643 + index for index, token in enumerate(QWEN_SPECIAL.split())}
QWEN_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        repository: name of the original's repository.
        config: configuration of the model.
        tokens: ids of its special tokens, by token.
        roles: special tokens by what transformers calls them.
        prepend_bos: whether its tokenizer begins text with the token of this role.
        stop: ids that end an answer.
        processor: function that makes its processor of a tokenizer.
    """

    repository: str
    config: PreTrainedConfig
    tokens: dict[str, int]
    roles: dict[str, str]
    prepend_bos: bool
    stop: list[int]
    processor: Callable[[PreTrainedTokenizerFast], Any]


def _clip() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


# What the language models of the LLaVAs have in common.
LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _vicuna() -> LlamaConfig:
    return LlamaConfig(
        intermediate_size=11008,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        **LLAMA_7B,
    )


def _mistral() -> MistralConfig:
    return MistralConfig(
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=None,
        **LLAMA_7B,
    )


def _llava(
    repository: str,
    config_class: Any,
    text: PreTrainedConfig,
    processor: Callable[..., Any],
    chat_template: str,
    **options: Any,
) -> Published:
    config = config_class(
        vision_config=_clip(),
        text_config=text,
        image_token_index=LLAVA_TOKENS["<image>"],
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        pad_token_id=LLAVA_TOKENS["<pad>"],
        tie_word_embeddings=False,
        **options,
    )

    def make(tokenizer: PreTrainedTokenizerFast) -> Any:
        return processor(
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
            chat_template=chat_template,
        )

    stop = [LLAVA_TOKENS["</s>"]]
    return Published(repository, config, LLAVA_TOKENS, LLAVA_ROLES, True, stop, make)


def _llava_processor(**options: Any) -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    return LlavaProcessor(image_processor=images, **options)


def _llava_next_processor(**options: Any) -> LlavaNextProcessor:
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(image_processor=images, **options)


def _llava_next(repository: str, text: PreTrainedConfig, chat_template: str) -> Published:
    return _llava(
        repository,
        LlavaNextConfig,
        text,
        _llava_next_processor,
        chat_template,
        image_grid_pinpoints=PINPOINTS,
        use_image_newline_parameter=True,
    )


def _qwen2_vl() -> Published:
    ids = QWEN_TOKENS
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=False,
    )

    def make(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLProcessor:
        pixels = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
        return Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=pixels),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
            chat_template=QWEN,
        )

    stop = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    repository = "Qwen/Qwen2-VL-7B-Instruct"
    return Published(repository, config, QWEN_TOKENS, QWEN_ROLES, False, stop, make)


def published(name: str) -> Published:
    """A model by its name in `models.NAMES`."""
    match name:
        case "llava-1.5-7b":
            repository = "llava-hf/llava-1.5-7b-hf"
            return _llava(repository, LlavaConfig, _vicuna(), _llava_processor, VICUNA)
        case "llava-next-vicuna-7b":
            return _llava_next("llava-hf/llava-v1.6-vicuna-7b-hf", _vicuna(), VICUNA)
        case "llava-next-mistral-7b":
            return _llava_next("llava-hf/llava-v1.6-mistral-7b-hf", _mistral(), MISTRAL)
    return _qwen2_vl()
