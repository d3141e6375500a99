"""Attention for training with grouped query heads: two batched products a KV head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@torch.library.custom_op("sparsemm_reader::row_softmax", mutates_args=())
def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, kept out of the compiler, which makes it slower."""
    return scores.softmax(-1)


@softmax.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty_like(scores)


def _keep_weights(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _softmax_gradient(ctx: Any, grad: Tensor) -> Tensor:
    (weights,) = ctx.saved_tensors
    weighted = grad * weights
    return weighted - weights * weighted.sum(-1, keepdim=True)


softmax.register_autograd(_softmax_gradient, setup_context=_keep_weights)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as two batched products, the queries of a KV head stacked.

    ``query [B, Hq, T, D]``, ``key`` and ``value [B, Hkv, T, D]``, additive ``attention_mask``
    broadcast over heads; returns ``[B, T, Hq, D]``. On a CPU its backward is several times as fast
    as that of the fused kernel.
    """
    b, hq, t, d = query.shape
    groups = b * key.shape[1]
    stacked = (query * scaling).reshape(groups, -1, d)
    scores = torch.bmm(stacked, key.reshape(groups, t, d).transpose(1, 2)).view(b, hq, t, t)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = softmax(scores).view(groups, -1, t)
    out = torch.bmm(weights, value.reshape(groups, t, d)).view(b, hq, t, d)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("grouped", grouped_attention)
