"""What each method keeps of prompts: masks, by the plugin's own budgets and selection."""

import torch
from torch import Tensor

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.triton_kernels.reference import kept_tokens

from .model import Prompts

REDISTRIBUTED = "+redistribute"  # of a method's name: what capped heads cannot use is shared out


def shown_tokens(prompts: Prompts, method: str, scores: Tensor, budget: int) -> Tensor:
    """The prompt tokens that each head sees while decoding, bool ``[L, N, Hkv, n]``.

    Random scores of a prompt are drawn from its index.

    Args:
        prompts: computed prompts, `N` of them.
        method: name of `METHODS`, with `REDISTRIBUTED` behind it or not.
        scores: visual scores ``[L, Hq]``.
        budget: tokens per KV head on average, the window included, `B`.
    """
    N, Hkv, n, _ = prompts.keys[0].shape
    name = method.removesuffix(REDISTRIBUTED)
    layout = CacheLayout.from_scores(
        scores, Hkv, budget, prompts.window, method=name, redistribute=name != method
    )
    shown = torch.zeros(len(prompts.keys), N, Hkv, n, dtype=torch.bool)
    for row, length in enumerate(prompts.lengths):
        shown[:, row, :, n - length :] = _one(prompts, row, layout)
    return shown


def _one(prompts: Prompts, row: int, layout: CacheLayout) -> Tensor:
    """The same for one prompt, ``[L, Hkv, length]``."""
    length, W, rules = prompts.lengths[row], prompts.window, layout.rules
    L, Hkv = len(prompts.keys), prompts.keys[0].shape[1]
    if not layout.is_pruned(length):
        return torch.ones(L, Hkv, length, dtype=torch.bool)
    lengths = torch.from_numpy(layout.kept_tokens(length))
    shown = torch.zeros(L, Hkv, length, dtype=torch.bool)
    shown[:, :, length - W :] = True
    for layer in range(L):
        scores = prompts.scores[row][layer]
        if rules.token_scores:
            scores = rules.token_scores(row, layer, range(Hkv), length - W)
        own = rules.split(scores, layout.base) if rules.split else lengths[layer]
        for head, positions in enumerate(kept_tokens(scores, own)):
            shown[layer, head, positions] = True
    return shown


def without_head(prompts: Prompts, layer: int, head: int) -> Tensor:
    """Everything, but one KV head sees its window only."""
    shown = prompts.everything()
    shown[layer, :, head, : prompts.columns - prompts.window] = False
    return shown


def held_tokens(shown: Tensor) -> Tensor:
    """Tokens a KV head holds of its prompt, on average, the window included, ``[N]``."""
    return shown.sum(-1).double().mean((0, 2))
