"""The methods that SparseMM is compared with, and SparseMM itself: the same pruning, other budgets.

A method says how many prompt tokens each KV head keeps besides the window, its capacities: int32
``[L, Hkv]`` from a budget, of some also from the prompt's length `n` or its scores. The rest is
shared: the window's attention scores the tokens, each head keeps its ``min(capacity, n - W)`` best.

When a prompt is pruned is one rule for all methods, `CacheLayout.is_pruned`: ``n - W >= B - W``.
The published code writes it in three ways, which agree: SnapKV keeps everything if ``n < B``;
SparseMM and AdaKV if ``B - W > n - W``; PyramidKV, layer by layer, if ``n`` is less than the
layer's capacity and the window, and no layer's capacity is below ``n - W`` if ``n < B``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsemm_vllm.budget.capacities import head_capacities
from sparsemm_vllm.budget.random_scores import random_scores


@dataclass(frozen=True, eq=False)
class Budget:
    """What there is to share out, and among which heads.

    Args:
        scores: visual scores ``[L, Hq]``, not negative, not all zero; only `sparsemm` tells heads
            apart by them, the others need their shape.
        num_kv_heads: KV heads of a layer, `Hkv`; a divisor of `Hq`.
        tokens: tokens per KV head on average, the window included, `B`.
        window: number of last prompt tokens that every head keeps, `W`.
        rho: share of the budget that is spread evenly, 0 to 1.

    Raises:
        ValueError: for what `head_capacities` refuses, whatever the method.
    """

    scores: torch.Tensor
    num_kv_heads: int
    tokens: int
    window: int = 32
    rho: float = 0.1

    def __post_init__(self) -> None:
        sparsemm(self)

    @property
    def base(self) -> int:
        """Tokens per head besides the window, on average."""
        return self.tokens - self.window

    def each_layer(self, capacities: list[int]) -> torch.Tensor:
        """Int32 ``[L, Hkv]`` from a capacity for each layer, the same for its heads."""
        rows = torch.tensor(capacities).clamp(max=2**31 - 1).to(torch.int32)[:, None]
        return rows.expand(-1, self.num_kv_heads).contiguous()


def sparsemm(budget: Budget) -> torch.Tensor:
    """By the heads' visual scores; see `head_capacities`."""
    return head_capacities(
        budget.scores, budget.num_kv_heads, budget.tokens, budget.window, budget.rho
    )


def full(budget: Budget) -> torch.Tensor:
    """Every head keeps whatever there is."""
    return budget.each_layer([2**31 - 1] * len(budget.scores))


def snapkv(budget: Budget) -> torch.Tensor:
    """Every head keeps the same number. Source: SnapKV, https://arxiv.org/abs/2404.14469."""
    return budget.each_layer([budget.base] * len(budget.scores))


def pyramidkv(budget: Budget, beta: int = 20) -> torch.Tensor:
    """Fewer tokens the deeper the layer, in equal steps; the heads of a layer alike.

    Source: PyramidKV, https://arxiv.org/abs/2406.02069, as the published SparseMM code has it. The
    last layer is to keep ``base // beta`` tokens, the first what makes the mean the base budget;
    `shorten_pyramid` tells what short prompts change. The step is rounded down, so that all layers
    but the first keep more than that: the mean is up to ``(L - 2) / 2`` tokens above the base
    budget. PyramidKV's own code keeps the base budget in every layer if ``n < 2 * (B - W)``; this
    one does not.

    Args:
        budget: tokens to share out, and the heads that get them.
        beta: divisor of the base budget that gives the last layer's capacity, at least 1.

    Raises:
        ValueError: for a beta below 1.
    """
    if beta < 1:
        raise ValueError(f"beta is {beta}; it must be at least 1")
    base = budget.base
    return budget.each_layer(_pyramid(len(budget.scores), base, 2 * base - base // beta))


def shorten_pyramid(capacities: torch.Tensor, base: int, older: int) -> torch.Tensor:
    """A pyramid for a prompt that its first layer might keep whole: then the last keeps more.

    Args:
        capacities: result of `pyramidkv`, int ``[L, Hkv]``, in tokens.
        base: tokens per head besides the window, on average.
        older: prompt tokens before the window, ``n - W``.

    Returns:
        int32 ``[L, Hkv]`` of at most `older`, if `base` is not more.
    """
    first = min(int(capacities[0, 0]), older)
    layers = torch.tensor(_pyramid(len(capacities), base, first), dtype=torch.int32)
    return layers[:, None].expand(capacities.shape)


def _pyramid(layers: int, base: int, first: int) -> list[int]:
    """A capacity for each layer; the published code divides by zero if there is only one."""
    if layers == 1:
        return [base]
    step = 2 * (first - base) // (layers - 1)
    return [first - layer * step for layer in range(layers)]


def random_heads(budget: Budget, seed: int = 0) -> torch.Tensor:
    """As `sparsemm`, by random scores of the heads, the same for every prompt.

    This is what the published SparseMM code does with ``head_score = random``: other heads get the
    tokens, which are still chosen by attention.
    """
    L, Hq = budget.scores.shape
    scores = torch.stack([random_scores(seed, layer, range(Hq), 1)[:, 0] for layer in range(L)])
    return head_capacities(scores, budget.num_kv_heads, budget.tokens, budget.window, budget.rho)


def adakv_split(scores: torch.Tensor, base: int, floor_share: float = 0.2) -> torch.Tensor:
    """Capacities of a layer's heads from the scores of one prompt; the layer's total stays.

    The layer's ``Hkv * base`` best tokens are found among those of all heads together, a head's
    scores weighted by the part of them that its `base` best hold. With ``won[h]`` of them in head
    `h`, it keeps ``round((1 - floor_share) * won[h] + int(floor_share * base))``. That rounds
    twice, as published: the total is ``Hkv * base`` less what the floors lost, give or take
    ``Hkv / 2``, so never above ``Hkv * (base + 1 / 2)``. No head gets more than ``n - W``.

    Equal scores count by their rank in their head, then by head. Does not wait for the device.

    Source: Ada-KV, https://arxiv.org/abs/2407.11550, with `normalize`, as in the published SparseMM
    code.

    Args:
        scores: pooled scores of the tokens before the window, ``[Hkv, n - W]``, not negative.
        base: tokens per head of the layer, besides the window.
        floor_share: share of `base` that every head has at least, 0 to 1.

    Returns:
        int32 ``[Hkv]``, on the device of the scores.

    Raises:
        ValueError: for fewer tokens than `base` (such a prompt is not pruned) or a share outside
            0 to 1.
    """
    Hkv, older = scores.shape
    if not 0 < base <= older:
        raise ValueError(f"base is {base}; it must lie between 1 and the {older} tokens scored")
    if not 0.0 <= floor_share <= 1.0:
        raise ValueError(f"floor_share is {floor_share}; it must lie between 0 and 1")
    best = scores.float().sort(dim=1, descending=True).values
    # A head that sees the window only has no scores but zeros: it wins nothing.
    held = best[:, :base].sum(1) / best.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    by_rank = (best * held[:, None]).T.flatten()
    winners = by_rank.sort(descending=True, stable=True).indices[: Hkv * base] % Hkv
    won = torch.zeros_like(winners[:Hkv]).scatter_add_(0, winners, torch.ones_like(winners))
    return torch.round(won.double() * (1 - floor_share) + int(floor_share * base)).to(torch.int32)


def adakv_total(heads: int, base: int, floor_share: float = 0.2) -> int:
    """Most tokens that `adakv_split` gives a layer of so many heads."""
    return math.floor(heads * ((1 - floor_share) * base + int(floor_share * base) + 0.5))


@dataclass(frozen=True)
class Method:
    """What a method does in its particular way.

    Attributes:
        capacities: function from a budget to the tokens of all heads besides the window, int32
            ``[L, Hkv]``, for a prompt that is long enough for all of them.
        shorten: function from these capacities, the base budget and ``n - W`` to the capacities
            for one prompt. None if they are the same for every prompt.
        split: function from a prompt's scores to the capacities of one layer's heads, with the
            arguments and the result of `adakv_split`. None if `n` alone tells how many tokens a
            head keeps.
        split_total: function from a layer's heads and the base budget to the most tokens that
            `split` gives the layer.
        token_scores: function that scores the tokens, with the arguments and the result of
            `random_scores`. None if the window's attention scores them.
        prunes: whether any prompt is pruned.
    """

    capacities: Callable[[Budget], torch.Tensor]
    shorten: Callable[[torch.Tensor, int, int], torch.Tensor] | None = None
    split: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    split_total: Callable[[int, int], int] | None = None
    token_scores: Callable[..., torch.Tensor] | None = None
    prunes: bool = True


METHODS = {
    "sparsemm": Method(sparsemm),
    "full": Method(full, prunes=False),
    "snapkv": Method(snapkv),
    "pyramidkv": Method(pyramidkv, shorten=shorten_pyramid),
    "adakv": Method(snapkv, split=adakv_split, split_total=adakv_total),
    "random": Method(snapkv, token_scores=random_scores),
    "random_heads": Method(random_heads),
}
