"""Weights in 8 bits, and checkpoints that bring an 8-bit KV cache and its scales."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.v1.attention.backend import MultipleOf

from sparsemm_vllm import environment
from sparsemm_vllm.commands.check.oracle import Oracle
from sparsemm_vllm.engine.cpu.attention import SparseMMBackend as CpuBackend
from sparsemm_vllm.engine.worker import model_state
from support.engines import Engine, ask, assert_close, assert_same, assert_same_kept, settings
from support.tiny import make_gemma3, make_llama

pytestmark = pytest.mark.engine

BUDGET = 40
TOKENS = 12
TEXT = "<s>" + "a text without any picture. " * 6  # 171 tokens
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}


def rewrite(
    model: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], **scheme: Any
) -> Path:
    """Put other tensors in place of each of a checkpoint's, and say how they are quantised.

    Args:
        model: folder of the model; it is changed.
        change: function of a tensor's name and values that returns what is saved for it.
        scheme: keys of the checkpoint's quantisation, in the format of compressed-tensors.
    """
    tensors = load_file(model / "model.safetensors")
    saved = {n: t for name, tensor in tensors.items() for n, t in change(name, tensor).items()}
    save_file(saved, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    if scheme:
        common = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
        config["quantization_config"] = common | scheme
    (model / "config.json").write_text(json.dumps(config))
    return model


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of numbers in fp8, and a scale of each row."""
    scale = x.abs().amax(-1, keepdim=True) / LARGEST
    return (x / scale).to(FP8), scale


def quantize_weights(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale for each row of a layer's weights."""
    if not name.endswith("_proj.weight"):
        return {name: weight}
    values, scale = rounded(weight)
    return {name: values, f"{name}_scale": scale}


def dequantize_weights(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same weights in float32."""
    if not name.endswith("_proj.weight"):
        return {name: weight}
    values, scale = rounded(weight)
    return {name: values.float() * scale}


def round_input(module: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """Inputs of a layer as its 8-bit product sees them, for transformers."""
    values, scale = rounded(inputs[0])
    return values.float() * scale


def shared(kept: dict[tuple[int, int], np.ndarray], oracle: Oracle) -> float:
    """Share of what the heads keep in transformers that they keep here too."""
    both = sum(np.isin(positions, oracle.kept[head]).sum() for head, positions in kept.items())
    return float(both) / sum(map(len, oracle.kept.values()))


def test_weights_of_8_bits(tmp_path: Path) -> None:
    """Dense answers are vLLM's; heads keep what they keep in transformers, but for rounding."""
    weights = EIGHT_BITS | {"strategy": "channel", "dynamic": False}
    inputs = EIGHT_BITS | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    groups = {"group_0": group}
    model = make_llama(tmp_path / "quantized")
    rewrite(model, quantize_weights, format="float-quantized", config_groups=groups)

    (theirs,) = Engine(model, None).generate(ask(TEXT), max_tokens=TOKENS)
    (covered,) = Engine(model, settings(300)).generate(ask(TEXT), max_tokens=TOKENS)
    assert_same(covered, theirs)
    engine = Engine(model, settings(BUDGET, tmp_path / "kept"))
    (pruned,) = engine.generate(ask(TEXT), max_tokens=TOKENS)
    assert engine.all_free()
    assert np.abs(np.subtract(pruned.logprobs, theirs.logprobs)).max() > 0.1

    oracle = Oracle(rewrite(make_llama(tmp_path / "same"), dequantize_weights), engine.layout)
    for name, module in oracle.model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(round_input)
    oracle.generate(TEXT, [], 1)
    # A number that falls to the other side of a rounding bound changes what follows it.
    assert shared(engine.kept(pruned), oracle) > 0.9


def test_scales_of_an_8_bit_cache(tmp_path: Path) -> None:
    """A checkpoint that asks for an fp8 KV cache gets one, with its scales.

    Scales of other powers of two give the same numbers. If one were left out anywhere, keys or
    values would be too large by 64.
    """
    answers, every_kept = [], []
    for k_scale, v_scale in ((2**-6, 2**-5), (2**-5, 2**-6)):

        def add_scales(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            scales = {"k_proj": k_scale, "v_proj": v_scale}  # noqa: B023 (called at once)
            *_, layer, _ = ["", *name.split(".")]
            if layer not in scales:
                return {name: weight}
            kind = layer[0]
            scale = torch.tensor([scales[layer]])
            return {name: weight, name.replace("weight", f"{kind}_scale"): scale}

        folder = tmp_path / f"{k_scale}"
        scheme = EIGHT_BITS | {"strategy": "tensor", "dynamic": False}
        model = make_llama(folder / "model")
        rewrite(model, add_scales, format="dense", config_groups={}, kv_cache_scheme=scheme)
        engine = Engine(model, settings(BUDGET, folder / "kept"))
        assert engine.state.cache.tensor.dtype == FP8
        (answer,) = engine.generate(ask(TEXT), max_tokens=TOKENS)
        answers.append(answer)
        every_kept.append(engine.kept(answer))
        oracle = Oracle(make_llama(folder / "same"), engine.layout)
        oracle.generate(TEXT, [], 1)
        assert shared(engine.kept(answer), oracle) > 0.9
    assert_same(*answers, tolerance=1e-3)
    assert_same_kept(*every_kept)


@pytest.mark.parametrize("kernel_block", [1, 16])
def test_sliding_windows_kept_out_of_an_8_bit_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_block: int
) -> None:
    """Gemma 3: vLLM gives the layers in fp8 four times the tokens a block.

    With kernels that take multiples of 16 tokens, as on a GPU, it makes blocks larger at startup.
    """
    monkeypatch.setattr(
        CpuBackend, "get_supported_kernel_block_sizes", lambda *_: [MultipleOf(kernel_block)]
    )
    model = make_gemma3(tmp_path / "model")
    options = {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window"]}
    (theirs,) = Engine(model, None, **options).generate(ask(TEXT), max_tokens=TOKENS)
    (covered,) = Engine(model, settings(300), **options).generate(ask(TEXT), max_tokens=TOKENS)
    assert_same(covered, theirs)
    said: list[str] = []
    monkeypatch.setattr(model_state.logger, "info", said.append)
    engine = Engine(model, settings(BUDGET, tmp_path / "kept"), **options)
    held = engine.layout.held_blocks(1024, 1024, 64)
    assert f"in {held} KV blocks after its prefill, dense" in said[0]
    pools = engine.scheduler.kv_cache_config.kv_cache_groups
    assert {group.kv_cache_spec.dtype for group in pools} == {torch.float32, torch.uint8}
    assert engine.manager.block_size == engine.state.page_size == 64
    (cold,) = engine.generate(ask(TEXT), max_tokens=TOKENS)
    oracle = Oracle(model, engine.layout)
    oracle.generate(TEXT, [], 1)
    assert shared(engine.kept(cold), oracle) > 0.9
    (cached,) = engine.generate(ask(TEXT), max_tokens=TOKENS)
    assert cached.cached_tokens == 128
    assert_same(cached, cold)
    assert engine.all_free()


@pytest.mark.gpu
@pytest.mark.skipif(not environment.has_gpu(), reason="needs vLLM's kernels for fp8 weights")
def test_weights_quantised_by_vllm(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    options = {"quantization": "fp8", "dtype": "bfloat16"}
    (theirs,) = Engine(model, None, **options).generate(ask(TEXT), max_tokens=TOKENS)
    (covered,) = Engine(model, settings(300), **options).generate(ask(TEXT), max_tokens=TOKENS)
    assert_close(covered, theirs, tolerance=0.2)
    engine = Engine(model, settings(BUDGET), **options)
    first, second = engine.generate(ask(TEXT), ask(TEXT), max_tokens=TOKENS)
    assert np.abs(np.subtract(first.logprobs, theirs.logprobs)).max() > 0.1
    assert_close(first, second, tolerance=0.2)
    assert engine.all_free()
