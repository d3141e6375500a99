"""A model's files."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import HeadProfile, save_profile

from .head_scores import synthetic_profile
from .published import published
from .tokenizer import make_tokenizer


def profile_of(name: str, config: PreTrainedConfig) -> HeadProfile:
    """A synthetic head profile that fits a configuration."""
    text = config.get_text_config()
    return synthetic_profile(
        name,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        config_hash=config_hash(config),
    )


def write_model(name: str, folder: Path) -> None:
    """Configuration, processor, tokenizer and head profile of a model in `models.NAMES`."""
    model = published(name)
    config = model.config
    config.dtype = "bfloat16"
    suffix = "ForConditionalGeneration"
    config.architectures = [type(config).__name__.removesuffix("Config") + suffix]
    config.save_pretrained(folder)
    size = config.get_text_config().vocab_size
    tokenizer = make_tokenizer(size, model.tokens, model.roles, model.prepend_bos)
    model.processor(tokenizer).save_pretrained(folder)
    pad = model.tokens[model.roles["pad_token"]]
    GenerationConfig(eos_token_id=model.stop, pad_token_id=pad).save_pretrained(folder)
    save_profile(profile_of(name, config), folder / "profile.json")
