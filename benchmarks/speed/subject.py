"""The model that is measured, and the bytes that a decode step cannot do without."""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.profile import load_profile
from sparsemm_vllm.environment import has_gpu
from sparsemm_vllm.reader import READER, reader_folder

GIB = 1 << 30
EVEN = "none"  # profile of the settings
NARROW = {
    "num_hidden_layers": 2,
    "hidden_size": 512,  # heads keep their size
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
        name: name in tables.
        folder: folder that vLLM loads.
        profile: head profile, as the settings take it.
        window: window that it is pruned with, in tokens.
        element_size: bytes of a weight, and of a number in the cache.
        config: configuration of the language model.
    """

    name: str
    folder: Path
    profile: str
    window: int
    element_size: int
    config: Any

    @property
    def token_bytes(self) -> int:
        """KV bytes of a token, all layers and heads."""
        c = self.config
        return c.num_hidden_layers * kv_heads(c) * 2 * self.head_size * self.element_size

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads of the weights: language model and output layer."""
        c = self.config
        projections = 2 * (c.num_attention_heads + kv_heads(c)) * self.head_size * c.hidden_size
        layer = projections + 3 * c.hidden_size * c.intermediate_size
        weights = c.num_hidden_layers * layer + c.vocab_size * c.hidden_size
        return weights * self.element_size

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        c = self.config
        return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads

    def layout(self, budget: int, method: str) -> CacheLayout:
        """What a budget leaves of prompts."""
        if self.profile == EVEN:
            c = self.config
            scores, heads = torch.ones(c.num_hidden_layers, c.num_attention_heads), kv_heads(c)
        else:
            profile = load_profile(self.profile)
            scores, heads = profile.tensor(), profile.num_kv_heads
        return CacheLayout.from_scores(scores, heads, budget, self.window, method=method)


def reader() -> Subject:
    """The bundled model, for machines without a GPU."""
    folder = reader_folder()
    return Subject(READER, folder, READER, 16, 4, _text_config(folder))


def full_size(name: str, models: Path) -> Subject:
    """A model of benchmarks/models in bfloat16 with random weights, and its synthetic profile."""
    from models import prepare

    folder = prepare(name, models)
    return Subject(name, folder, str(folder / "profile.json"), 32, 2, _text_config(folder))


def shrunk(name: str, models: Path) -> Subject:
    """The same with two narrow layers and even budgets, to try a command without a GPU."""
    whole = full_size(name, models)
    config = copy.deepcopy(whole.config)
    for key, value in NARROW.items():
        setattr(config, key, value)
    return Subject(f"{name} (shrunk)", whole.folder, EVEN, 16, 4, config)


def kv_heads(config: Any) -> int:
    """Of a language model's configuration."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _text_config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder).get_text_config()


def copy_bandwidth(repeats: int = 10) -> float:
    """Bytes that this device reads and writes in a second while it copies, at its best."""
    cuda = has_gpu()
    source = torch.zeros(2 * GIB if cuda else GIB // 4, dtype=torch.uint8)
    source = source.to("cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        target.copy_(source)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * source.numel() / min(seconds)


def device_memory() -> int | None:
    """Bytes of the GPU; None without one."""
    return torch.cuda.mem_get_info()[1] if has_gpu() else None
