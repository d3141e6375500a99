"""The exported checkpoint: processor, float16 weights, names that vLLM expects."""

from pathlib import Path

import torch
from common import files_of
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .vocabulary import BOS, EOS, PAD, VOCAB


def make_processor(side: int, patch: int, chat_template: str) -> LlavaProcessor:
    """One token a character; pictures of the native size are only rescaled to -1..1."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = chat_template
    images = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=patch,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def save_checkpoint(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path
) -> None:
    """Save model and processor to ``out``, file by file in one move each.

    transformers 5 leaves ``vision_model.`` out of the tower's weight names, vLLM expects it;
    transformers loads both.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    with files_of(out) as folder:
        model.to(torch.float16).save_pretrained(folder)
        processor.save_pretrained(folder)
        weights = folder / "model.safetensors"
        tensors = {vllm_name(key): tensor for key, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    _, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    faults = {name: keys for name, keys in info.items() if keys}
    if faults:
        raise ValueError(f"{out} does not load cleanly: {faults}")


def vllm_name(key: str) -> str:
    tower = "vision_tower."
    return key.replace(tower, f"{tower}vision_model.") if "vision_model." not in key else key
