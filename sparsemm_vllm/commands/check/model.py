"""A small LLaVA with random weights, and pictures and a head profile for it. Needs no network."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsemm_vllm.budget.profile import HeadProfile

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_SIZE = 4, 8, 4, 32
IMAGE_TOKENS = 64
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}>"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": 4}
    for character in string.printable[:95] + "\n":
        vocab.setdefault(character, len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def text_config(
    query_heads: int = QUERY_HEADS, kv_heads: int = KV_HEADS, layers: int = LAYERS
) -> LlamaConfig:
    """The text model: a Llama with heads of 32 and 128 tokens in its vocabulary."""
    return LlamaConfig(
        vocab_size=128,
        hidden_size=query_heads * HEAD_SIZE,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=4096,
        # Random layers hardly move the residual stream; larger weights make every head matter.
        initializer_range=0.1,
    )


def make_llava(
    folder: Path,
    query_heads: int = QUERY_HEADS,
    kv_heads: int = KV_HEADS,
    layers: int = LAYERS,
    seed: int = 0,
) -> Path:
    """Write a LLaVA with random weights into a folder, in the form that vLLM loads.

    Args:
        folder: place for it; is made.
        query_heads: query heads of a layer.
        kv_heads: KV heads of a layer.
        layers: layers of the text model.
        seed: seed of the weights.

    Returns:
        The folder.
    """
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=112,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(query_heads, kv_heads, layers),
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    size = {"height": 112, "width": 112}
    images = CLIPImageProcessor(size={"shortest_edge": 112}, crop_size=size)
    return save_llava(folder, model, LlavaProcessor, images)


def save_llava(
    folder: Path, model: PreTrainedModel, processor_class: Any, image_processor: Any
) -> Path:
    """Save a random LLaVA or LLaVA-NeXT with patches of 14 pixels, in the form that vLLM loads.

    Args:
        folder: folder to make.
        model: model, with random weights.
        processor_class: class of its processor.
        image_processor: image processor of transformers that prepares its pictures.
    """
    model.to(torch.float32).save_pretrained(folder)
    processor_class(
        image_processor=image_processor,
        tokenizer=make_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    _rename_for_vllm(folder / "model.safetensors")
    return folder


def _rename_for_vllm(weights: Path) -> None:
    """transformers 5 drops `vision_model.` from the vision tower's names; vLLM expects it."""
    parts = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
    tensors = load_file(weights)
    for name in list(tensors):
        for part in parts:
            if name.startswith(f"vision_tower.{part}") or f".vision_tower.{part}" in name:
                renamed = name.replace(f"vision_tower.{part}", f"vision_tower.vision_model.{part}")
                tensors[renamed] = tensors.pop(name)
                break
    save_file({k: v.contiguous() for k, v in tensors.items()}, weights, metadata={"format": "pt"})


def picture(seed: int) -> Image.Image:
    """Noise of the size that this LLaVA takes: 64 tokens."""
    pixels = np.random.default_rng(seed).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def skewed_profile(
    layers: int = LAYERS, query_heads: int = QUERY_HEADS, kv_heads: int = KV_HEADS
) -> HeadProfile:
    """A profile in which few heads have most of the scores, as in real models.

    Budgets of heads then differ by ten times and more.
    """
    rng = np.random.default_rng(7)
    scores = rng.pareto(0.6, (layers, query_heads))
    return HeadProfile(
        model_id="tiny",
        num_layers=layers,
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        provenance={"method": "random, for tests"},
        scores=tuple(map(tuple, scores.tolist())),
    )
