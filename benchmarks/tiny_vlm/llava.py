"""The family of the small models: a LLaVA with a CLIP vision tower and a Llama, one size each."""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from .glyphs import PATCH
from .vocabulary import BOS, EOS, IMAGE, PAD, VOCAB

_CHAT = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>"
    "USER"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{{ '\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = _CHAT.replace("USER", "{% else %}<user>{% endif %}")
CHAT_WITH_SYSTEM = _CHAT.replace("USER", "{% elif message['role'] != 'system' %}<user>{% endif %}")


def image_tokens(side: int) -> int:
    """Image tokens of a picture of so many pixels a side."""
    return (side // PATCH) ** 2


def llava_config(side: int, vision_layers: int, **text: Any) -> LlavaConfig:
    """The configuration of a model.

    Args:
        side: width and height of its pictures, in pixels.
        vision_layers: layers of the vision tower.
        text: sizes of the language model, as `LlamaConfig` calls them.
    """
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=vision_layers,
        num_attention_heads=6,
        image_size=side,
        patch_size=PATCH,
    )
    language = LlamaConfig(
        vocab_size=len(VOCAB),
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **text,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=IMAGE,
        image_seq_length=image_tokens(side),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
