"""Random models, made on the fly: of other families than the one that the package makes."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
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
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from sparsemm_vllm.commands.check.model import (
    CHAT_TEMPLATE,
    HEAD_SIZE,
    LAYERS,
    QUERY_HEADS,
    make_tokenizer,
    save_llava,
    text_config,
)
from sparsemm_vllm.commands.check.model import KV_HEADS as KV_HEADS
from sparsemm_vllm.commands.check.model import make_llava as make_llava
from sparsemm_vllm.commands.check.model import picture as picture
from sparsemm_vllm.commands.check.model import skewed_profile as skewed_profile

TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT_SIZES = (
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
    model = LlavaNextForConditionalGeneration(config)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=pinpoints,
    )
    return save_llava(folder, model, LlavaNextProcessor, images)


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


def make_qwen3_vl_moe(folder: Path, seed: int = 0) -> Path:
    """The same with eight experts in each layer, of which a token takes two."""
    classes = Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, Qwen3VLProcessor
    vision = OWN_WIDTH | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    options = {"patch_size": 16, "mrope_interleaved": True}
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    }
    _make_qwen(folder, seed, classes, Qwen3VLVideoProcessor(), vision, experts, **options)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    for name, weight in weights.items():
        if ".experts." in name:  # released checkpoints, which both read, have inputs first
            weights[name] = weight.transpose(1, 2).contiguous()
    save_file(weights, file, {"format": "pt"})
    return folder


def _make_qwen(
    folder: Path,
    seed: int,
    classes: tuple[Any, Any, Any],
    video_processor: Any,
    vision: dict[str, Any],
    experts: dict[str, Any] | None = None,
    patch_size: int = 14,
    **rope: Any,
) -> Path:
    config_class, model_class, processor_class = classes
    tokenizer = make_tokenizer()
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(special, special_tokens=True)
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in special)
    text = text_config().to_dict() | {"model_type": f"{config_class.model_type}_text"}
    text |= experts or {}
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


def gemma3_config() -> Gemma3TextConfig:
    """A text-only Gemma 3: every other layer sees 32 tokens, and no scale is 1 / sqrt(D)."""
    return Gemma3TextConfig(
        **{key: getattr(text_config(), key) for key in TEXT_SIZES},
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        query_pre_attn_scalar=2 * HEAD_SIZE,
        tie_word_embeddings=False,  # or it repeats the last token for ever
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_gemma3(folder: Path, seed: int = 0) -> Path:
    """The model of `gemma3_config` with random weights."""
    torch.manual_seed(seed)
    Gemma3ForCausalLM(gemma3_config()).to(torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_llama4(folder: Path, seed: int = 0) -> Path:
    """A text-only Llama 4 without experts: every other layer sees a chunk of 48 tokens."""
    config = Llama4TextConfig(
        **{key: getattr(text_config(), key) for key in TEXT_SIZES},
        intermediate_size_mlp=text_config().intermediate_size,
        attention_chunk_size=48,
        no_rope_layers=[1, 0] * (LAYERS // 2),
        attn_temperature_tuning=False,  # vLLM has it for more than 32K tokens only
        moe_layers=[],
        interleave_moe_layer_step=LAYERS + 1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    Llama4ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
