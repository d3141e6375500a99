"""Silenced query heads: like a model whose output projection ignores them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsemm_vllm.budget.settings import Settings, SettingsError
from sparsemm_vllm.engine.worker.probes.masked_heads import (
    check_masked_heads,
    mask_layers,
    own_heads,
)
from support.engines import HELLO, Engine, ask, assert_same, settings
from support.tiny import HEAD_SIZE, LAYERS, QUERY_HEADS, make_llava

HEADS = [[1, 2], [3, 0], [3, 7]]


@pytest.mark.engine
def test_masked_heads_equal_a_model_without_them(tmp_path: Path) -> None:
    model = make_llava(tmp_path / "model")
    without = shutil.copytree(model, tmp_path / "without")
    weights = load_file(without / "model.safetensors")
    for layer, head in HEADS:
        (name,) = (n for n in weights if n.endswith(f"layers.{layer}.self_attn.o_proj.weight"))
        weights[name][:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE] = 0
    save_file(weights, without / "model.safetensors", metadata={"format": "pt"})

    masked = Engine(model, settings(40, mask_heads=HEADS)).generate(ask(HELLO, 1))
    expected = Engine(without, settings(40)).generate(ask(HELLO, 1))
    assert_same(masked[0], expected[0])
    plain = Engine(model, settings(40)).generate(ask(HELLO, 1))
    assert np.abs(np.subtract(masked[0].logprobs, plain[0].logprobs)).max() > 1e-2


def test_each_rank_masks_its_own_heads() -> None:
    heads = [[0, 1], [2, 3], [2, 4]]
    assert [own_heads(heads, 2, 4, rank) for rank in range(2)] == [[3], [0]]
    assert own_heads(heads, 0, 4, 1) == own_heads(heads, 1, 4, 0) == []


def test_other_layers_are_left_alone() -> None:
    def forward(layer: str, query: int, *, output: torch.Tensor) -> None:
        output += query

    layers = {
        f"model.layers.{i}.attn": SimpleNamespace(
            num_heads=2, impl=SimpleNamespace(forward=forward)
        )
        for i in range(3)
    }
    mask_layers(layers, [[1, 0]], 0)
    assert [layer.impl.forward is forward for layer in layers.values()] == [True, False, True]
    output = torch.ones(5, 2, 3, dtype=torch.bfloat16)
    layers["model.layers.1.attn"].impl.forward("a layer", 2, output=output)
    assert output.unique(dim=0).tolist() == [[[0, 0, 0], [3, 3, 3]]]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([[1, 2, 3]], r"mask_heads: \[1, 2, 3\] is no \[layer, query head\]"),
        ([[1, -1]], r"mask_heads: \[1, -1\] is no"),
        ([[1, 1], [0, 0], [1, 1]], r"mask_heads: \[1, 1\] stands there twice"),
        ([["1", 1]], r"mask_heads.0.0: Input should be a valid integer"),
        ([[LAYERS, 0]], rf"\[{LAYERS}, 0\] is no head of this model, which has {LAYERS} layers"),
        ([[0, QUERY_HEADS]], rf"\[0, {QUERY_HEADS}\] is no head .* of {QUERY_HEADS} query"),
    ],
)
def test_bad_heads(heads: list[list[int]], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_masked_heads(
            Settings.from_additional_config({"sparsemm": {"mask_heads": heads}}),
            LAYERS,
            QUERY_HEADS,
        )


def test_no_head_is_masked_by_default() -> None:
    check_masked_heads(Settings(), 1, 1)
    assert not Settings().mask_heads
