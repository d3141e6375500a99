"""Query heads that are silenced, to see what they are worth: their output is zero in every step.

What the setting `mask_heads` asks for; the published ablation of visual heads.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from sparsemm_vllm.settings import Settings, SettingsError


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


def own_mask(
    heads: Iterable[Sequence[int]], layer: int, own_heads: int, rank: int, device: torch.device
) -> torch.Tensor | None:
    """What the outputs of a rank's heads are multiplied by: ``[own_heads, 1]``, 0 or 1.

    Args:
        heads: to silence, layer and query head of the whole model.
        layer: of these outputs.
        own_heads: query heads of each tensor-parallel rank.
        rank: this one.
        device: of the outputs.

    Returns:
        None if none of them is silenced.
    """
    first = rank * own_heads
    masked = [head - first for at, head in heads if at == layer and 0 <= head - first < own_heads]
    if not masked:
        return None
    mask = torch.ones(own_heads, 1, device=device)
    mask[masked] = 0
    return mask


def mask_layers(
    layers: dict[str, Any], heads: Sequence[Sequence[int]], rank: int, device: torch.device
) -> None:
    """Let attention layers put out zeros for some heads, whatever their backend computes.

    Args:
        layers: vLLM's, by name; those of this pipeline stage.
        heads: to silence, layer and query head of the whole model.
        rank: among the tensor-parallel ones.
        device: of the layers' outputs.
    """
    for name, layer in layers.items():
        mask = own_mask(heads, extract_layer_index(name), layer.num_heads, rank, device)
        if mask is not None:
            layer.impl.forward = _masked(layer.impl.forward, mask)


def _masked(forward: Callable[..., Any], mask: torch.Tensor) -> Callable[..., Any]:
    def masked_forward(*args: Any, output: torch.Tensor, **options: Any) -> torch.Tensor:
        forward(*args, output=output, **options)
        return output.mul_(mask)  # [T, Hq, D]

    return masked_forward
