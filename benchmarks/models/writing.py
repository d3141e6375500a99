"""A model's files."""

from pathlib import Path

from transformers import GenerationConfig

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import save_profile

from .head_scores import synthetic_profile
from .published import published
from .tokenizer import make_tokenizer


def write_model(name: str, folder: Path) -> None:
    """Configuration, processor, tokenizer and head profile of a model in `models.NAMES`."""
    model = published(name)
    config = model.config
    config.dtype = "bfloat16"
    suffix = "ForConditionalGeneration"
    config.architectures = [type(config).__name__.removesuffix("Config") + suffix]
    config.save_pretrained(folder)
    text = config.get_text_config()
    tokenizer = make_tokenizer(text.vocab_size, model.tokens, model.roles, model.prepend_bos)
    model.processor(tokenizer).save_pretrained(folder)
    pad = model.tokens[model.roles["pad_token"]]
    GenerationConfig(eos_token_id=model.stop, pad_token_id=pad).save_pretrained(folder)
    heads = text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads
    profile = synthetic_profile(name, *heads, config_hash=config_hash(config))
    save_profile(profile, folder / "profile.json")
