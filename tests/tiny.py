"""Random models, made on the fly, and pictures and profiles for them."""

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
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from sparsemm_vllm.profile import HeadProfile

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_SIZE = 4, 8, 4, 32
IMAGE_TOKENS = 64
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
GEMMA_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
)
# Of the vision towers that project to the width of the text model.
OWN_WIDTH = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "out_hidden_size": QUERY_HEADS * HEAD_SIZE,
}
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


def text_config(query_heads: int = QUERY_HEADS, kv_heads: int = KV_HEADS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128,
        hidden_size=query_heads * HEAD_SIZE,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=4096,
        # Random layers hardly move the residual stream; larger weights make every head matter.
        initializer_range=0.1,
    )


def make_llava(
    folder: Path, query_heads: int = QUERY_HEADS, kv_heads: int = KV_HEADS, seed: int = 0
) -> Path:
    """A LLaVA of four layers with random weights, in the form that vLLM loads."""
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
        text_config=text_config(query_heads, kv_heads),
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
    )
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    size = {"height": 112, "width": 112}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 112}, crop_size=size),
        tokenizer=make_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    _rename_for_vllm(folder / "model.safetensors")
    return folder


def make_llava_next(folder: Path, seed: int = 0) -> Path:
    """A LLaVA-NeXT of four layers with random weights: 4 x 4 patches a view, up to 4 tiles."""
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=text_config(),
        image_token_index=4,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    LlavaNextForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=make_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    _rename_for_vllm(folder / "model.safetensors")
    return folder


def make_qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """A Qwen2-VL of four layers with random weights: 28 pixels a token, as many as there are."""
    classes = Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    vision = {"embed_dim": 64, "hidden_size": QUERY_HEADS * HEAD_SIZE, "mlp_ratio": 2}
    return _make_qwen(folder, seed, classes, Qwen2VLVideoProcessor(), vision)


def make_qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """A Qwen2.5-VL of four layers with random weights: a vision layer has windows of 56 pixels."""
    classes = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    vision = OWN_WIDTH | {"window_size": 56, "fullatt_block_indexes": [1]}
    return _make_qwen(folder, seed, classes, Qwen2VLVideoProcessor(), vision)


def make_qwen3_vl(folder: Path, seed: int = 0) -> Path:
    """A Qwen3-VL of four layers with random weights: 32 pixels a token, one deepstack layer."""
    classes = Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    vision = OWN_WIDTH | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    options = {"patch_size": 16, "mrope_interleaved": True}
    return _make_qwen(folder, seed, classes, Qwen3VLVideoProcessor(), vision, **options)


def _make_qwen(
    folder: Path,
    seed: int,
    classes: tuple[Any, Any, Any],
    video_processor: Any,
    vision: dict[str, Any],
    patch_size: int = 14,
    **rope: Any,
) -> Path:
    config_class, model_class, processor_class = classes
    tokenizer = make_tokenizer()
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(special, special_tokens=True)
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in special)
    text = text_config().to_dict() | {"model_type": f"{config_class.model_type}_text"}
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [4, 6, 6],
        "rope_theta": 1e4,
        **rope,
    }
    config = config_class(
        vision_config={"depth": 2, "num_heads": 2, "patch_size": patch_size} | vision,
        text_config=text,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    torch.manual_seed(seed)
    model_class(config).to(torch.float32).save_pretrained(folder)
    template = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.chat_template = template
    processor_class(
        image_processor=Qwen2VLImageProcessor(
            patch_size=patch_size, size={"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
        ),
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def make_llama(folder: Path, seed: int = 0) -> Path:
    """A text-only Llama of four layers with random weights."""
    torch.manual_seed(seed)
    LlamaForCausalLM(text_config()).to(torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_gemma3(folder: Path, seed: int = 0) -> Path:
    """A text-only Gemma 3: every other layer sees 32 tokens, and no scale is 1 / sqrt(D)."""
    config = Gemma3TextConfig(
        **{key: getattr(text_config(), key) for key in GEMMA_SIZES},
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        query_pre_attn_scalar=2 * HEAD_SIZE,
        tie_word_embeddings=False,  # or it repeats the last token for ever
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    Gemma3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
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
    """Noise of the size that the tiny LLaVA takes."""
    pixels = np.random.default_rng(seed).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def skewed_profile(
    layers: int = LAYERS, query_heads: int = QUERY_HEADS, kv_heads: int = KV_HEADS
) -> HeadProfile:
    """Few heads with most of the mass, as in real models: budgets differ by 10x and more."""
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
