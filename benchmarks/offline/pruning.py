"""What each method keeps of prompts: masks, by the plugin's own budgets and selection."""

import torch
from torch import Tensor

from sparsemm_vllm.methods import METHODS, Budget, redistribute
from sparsemm_vllm.triton_kernels.reference import kept_tokens

from .model import Prompts

REDISTRIBUTED = "+redistribute"  # of a method's name: what capped heads cannot use is shared out


def shown_tokens(
    prompts: Prompts,
    method: str,
    scores: Tensor,
    budget: int,
    rho: float = 0.1,
    first_seed: int = 0,
) -> Tensor:
    """The prompt tokens that each head sees while decoding, bool ``[L, N, Hkv, n]``.

    Args:
        prompts: `N` computed prompts.
        method: a name of `METHODS`, with `REDISTRIBUTED` behind it or not.
        scores: visual scores ``[L, Hq]``.
        budget: `B`, tokens per KV head on average, the window included.
        rho: share of the budget that is spread evenly.
        first_seed: of the random scores of the first prompt; each has its own.
    """
    N, Hkv, n, _ = prompts.keys[0].shape
    shared = Budget(scores, Hkv, budget, prompts.window, rho)
    shown = torch.zeros(len(prompts.keys), N, Hkv, n, dtype=torch.bool)
    for row, length in enumerate(prompts.lengths):
        shown[:, row, :, n - length :] = _one(prompts, row, method, shared, first_seed + row)
    return shown


def _one(prompts: Prompts, row: int, method: str, budget: Budget, seed: int) -> Tensor:
    """The same for one prompt, ``[L, Hkv, length]``."""
    length, W = prompts.lengths[row], prompts.window
    L, Hkv = len(prompts.keys), prompts.keys[0].shape[1]
    if length - W < budget.base:
        return torch.ones(L, Hkv, length, dtype=torch.bool)
    name = method.removesuffix(REDISTRIBUTED)
    capacities = METHODS[name].capacities(budget, length)
    if name != method:
        capacities = redistribute(capacities, length, W)
    shown = torch.zeros(L, Hkv, length, dtype=torch.bool)
    shown[:, :, length - W :] = True
    for layer in range(L):
        scores, split = prompts.scores[row][layer], METHODS[name].split
        if random_scores := METHODS[name].token_scores:
            scores = random_scores(seed, layer, range(Hkv), length - W)
        own = split(scores, budget.base) if split else capacities[layer]
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
