"""What a model is built like, as one short string: profiles name the model they were made for."""

import hashlib
import json
from typing import Any

# The fields that size the weights and order the image tokens. Not all that a configuration holds:
# new versions of transformers add fields, and users override lengths and types.
MODEL = ("model_type", "vision_feature_layer", "vision_feature_select_strategy")
TEXT = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
VISION = (
    "model_type",
    "hidden_size",
    "embed_dim",
    "intermediate_size",
    "num_hidden_layers",
    "depth",
    "num_attention_heads",
    "num_heads",
    "image_size",
    "patch_size",
    "spatial_merge_size",
)


def config_hash(config: Any) -> str:
    """SHA-256, hexadecimal, of what a model's configuration says about its architecture.

    Equal wherever the model lies and whatever versions of vLLM and transformers read it. Models
    that differ in their weights only have equal ones.

    Args:
        config: the model's configuration, as transformers or vLLM read it; both use the same names.
    """
    parts = (
        (config, MODEL),
        (config.get_text_config(), TEXT),
        (getattr(config, "vision_config", None), VISION),
    )
    facts = [{name: getattr(part, name, None) for name in names} for part, names in parts]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
