"""Layers that the backends do not take are refused, in vLLM's words or in ours."""

import importlib
from typing import Any

import pytest
import torch

from support.configs import refused

LAYERS = {
    "attention sinks": ({"has_sink": True}, "attention sinks not supported"),
    "two-way attention of image tokens": (
        {"use_mm_prefix": True},
        "partial multimodal token full attention not supported",
    ),
    "scales per head": ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
    "encoders": ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
    "non-causal": ({"use_non_causal": True}, "non-causal attention not supported"),
    "batch invariance": ({"use_batch_invariant": True}, "batch invariance not supported"),
    "KV connectors": ({"use_kv_connector": True}, "KV connector not supported"),
    "int8 caches": ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype not supported"),
    "fp8 caches of e5m2": ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
    "large heads": ({"head_size": 264}, "head_size not supported"),
    "odd heads": ({"head_size": 36}, "head_size not supported"),
    "8-byte numbers": ({"dtype": torch.float64}, "dtype not supported"),
    "MLA": ({"use_mla": True}, "MLA not supported"),
    "sparse attention": ({"use_sparse": True}, "sparse not supported"),
    "reference sliding window": ({"use_rswa": True}, "R-SWA not supported"),
    "decode context parallelism": ({"use_dcp": True}, "DCP not supported"),
    "prefill context parallelism": ({"use_pcp": True}, "PCP not supported"),
    "drafts that the device shortens": (
        {"use_adaptive_verification": True},
        "device-cpu query lens mismatch not supported, this is needed for adaptive verification",
    ),
}


BACKENDS = {
    "cpu": "sparsemm_vllm.engine.cpu.attention",
    "cuda": "sparsemm_vllm.engine.attention.cuda",
}


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SPARSEMM on this platform; of GPUs an H100, where FlashAttention 3 and 4 can do most."""
    from vllm.v1.attention.backends import flash_attn

    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *_, **__: 3)
    monkeypatch.setattr(flash_attn, "is_fa_version_supported", lambda *_: True)
    module = importlib.import_module(BACKENDS[request.param])
    return module.SparseMMBackend


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_the_backend_does_not_take(backend: Any, name: str) -> None:
    """vLLM asks the backend about each layer, and refuses with these words."""
    assert refused(backend) == []
    options, reason = LAYERS[name]
    assert refused(backend, **options) == [reason]


def test_what_a_gpu_does_not_take() -> None:
    from sparsemm_vllm.engine.attention.cuda import SparseMMBackend

    assert refused(SparseMMBackend, (8, 0)) == []
    assert refused(SparseMMBackend, (7, 5)) == ["compute capability not supported"]
    for taken in ({"kv_cache_dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}):
        assert refused(SparseMMBackend, **taken) == []
    for dtype in (torch.float16, torch.float32):
        assert refused(SparseMMBackend, dtype=dtype) == []


# What vLLM's own answer is right for.
INHERITED = {
    "supports_dtype": "looks in supported_dtypes, which are ours",
    "supports_block_size": "asks get_supported_kernel_block_sizes: the kernels take any page, "
    "FlashAttention says which it takes",
    "supports_compute_capability": "our kernels run wherever FlashAttention does",
}
INHERITED_ON_THE_CPU = INHERITED | {
    "supports_kv_cache_dtype": "looks in supported_kv_cache_dtypes, which are ours",
    "supports_combination": "nothing depends on two of them",
}


def test_every_question_of_vllms_has_an_answer_of_ours(backend: Any) -> None:
    """A new one would be answered by a base class, for dense attention."""
    inherited = INHERITED if "cuda" in backend.__module__ else INHERITED_ON_THE_CPU
    answered = {
        name
        for base in backend.__mro__
        if base.__module__.startswith("sparsemm_vllm.")
        for name in vars(base)
    }
    asked = {name for name in dir(backend) if name.startswith("supports_")}
    assert len(asked) >= 20
    assert asked - answered == inherited.keys()


@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a logit soft cap"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "a KV cache shared between layers"),
    ],
    ids=["ALiBi", "soft cap", "shared cache"],
)
def test_variants_of_attention(options: dict[str, Any], variant: str) -> None:
    from sparsemm_vllm.engine.config import UnsupportedError
    from sparsemm_vllm.engine.cpu.attention import TorchAttentionImpl

    TorchAttentionImpl(8, 64, 0.125, 4)
    with pytest.raises(UnsupportedError, match=f"does not compute attention with {variant}"):
        TorchAttentionImpl(8, 64, 0.125, 4, **options)
