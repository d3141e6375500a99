"""Query heads that are silenced, to see what they are worth: their output is zero in every step.

What the setting `mask_heads` asks for; the published ablation of visual heads.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from sparsemm_vllm.budget.settings import Settings, SettingsError
from sparsemm_vllm.engine.vllm_api.signatures import argument


def check_masked_heads(settings: Settings, layers: int, query_heads: int) -> None:
    """Refuse heads that the model does not have.

    Raises:
        SettingsError: naming the first of them.
    """
    for layer, head in settings.mask_heads:
        if layer >= layers or head >= query_heads:
            raise SettingsError(
                f"sparsemm setting mask_heads: [{layer}, {head}] is no head of this model, which "
                f"has {layers} layers of {query_heads} query heads"
            )


def own_heads(heads: Iterable[Sequence[int]], layer: int, count: int, rank: int) -> list[int]:
    """Which of a rank's heads in a layer are silenced, counted from its first.

    Args:
        heads: heads to silence, layer and query head of the whole model.
        layer: index of the layer in the whole model.
        count: query heads of each tensor-parallel rank.
        rank: tensor-parallel rank, from 0.
    """
    first = rank * count
    return [head - first for at, head in heads if at == layer and 0 <= head - first < count]


def mask_layers(layers: dict[str, Any], heads: Sequence[Sequence[int]], rank: int) -> None:
    """Let attention layers put out zeros for some heads, whatever their backend computes.

    Args:
        layers: attention layers of this pipeline stage, by name.
        heads: heads to silence, layer and query head of the whole model.
        rank: tensor-parallel rank, from 0.
    """
    for name, layer in layers.items():
        if own := own_heads(heads, extract_layer_index(name), layer.num_heads, rank):
            layer.impl.forward = _masked(layer.impl.forward, own)


def _masked(forward: Callable[..., Any], heads: list[int]) -> Callable[..., Any]:
    output_of = argument(forward, "output")

    def masked_forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        forward(*args, **kwargs)
        output = output_of(*args, **kwargs)
        for head in heads:  # no tensor on the device, which sleep of level 2 would empty
            output[:, head].zero_()  # [T, Hq, D]
        return output

    return masked_forward
