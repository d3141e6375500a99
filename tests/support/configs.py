"""Configurations of vLLM's, made without an engine, and what a backend says of them."""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from support.tiny import make_tokenizer

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}


def build(model: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """The configuration that `vllm serve` would build; no engine, no weights."""
    from vllm.engine.arg_utils import EngineArgs

    defaults: dict[str, Any] = {
        "attention_backend": "SPARSEMM",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "additional_config": {"sparsemm": settings or {}},
    }
    return EngineArgs(model=str(model), **(defaults | options)).create_engine_config()


def save(folder: Path, config: PretrainedConfig, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def refused(backend: Any, capability: tuple[int, int] = (9, 0), **options: Any) -> list[str]:
    """What vLLM answers to a layer like this one."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    config = AttentionSelectorConfig(256, torch.bfloat16, "auto", 16)._replace(**options)
    gpu = DeviceCapability(*capability)
    return backend.validate_configuration(**config._asdict(), device_capability=gpu)  # type: ignore[no-any-return]
