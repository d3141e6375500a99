"""What heads cannot use of a short prompt goes to the others."""

from bisect import bisect_left

import numpy as np
import torch


def redistribute(capacities: torch.Tensor, prompt_tokens: int, window: int) -> torch.Tensor:
    """Give what heads cannot use, because the prompt is too short, to the others: water-filling.

    Heads that want more than the ``n - W`` tokens there are get these; what is left over goes to
    the others in proportion to their capacities, until no head is over. Heads of capacity 0 get
    something, each the same, only when all others are full. Fractions go to the largest
    remainders, equal ones to the lowest index; a head never gets less than it would without, nor
    less than a head of smaller capacity.

    Args:
        capacities: tokens of each head, int ``[L, Hkv]`` below ``2**31``, not capped by the prompt.
        prompt_tokens: length `n` of the prompt, in tokens.
        window: observation window `W`, in tokens.

    Returns:
        int32 ``[L, Hkv]`` of at most ``n - W``; the total is that of `capacities`, or all tokens
        of all heads if there are fewer.
    """
    most = max(0, prompt_tokens - window)
    wanted = capacities.numpy().astype(np.int64)
    left = int(wanted.sum())
    kept = np.zeros_like(wanted)
    for group, weights in (wanted > 0, wanted), (wanted == 0, np.ones_like(wanted)):
        kept[group] = _fill(weights[group], min(left, most * int(group.sum())), most)
        left -= int(kept[group].sum())
    return torch.from_numpy(kept.astype(np.int32))


def _fill(weights: np.ndarray, tokens: int, most: int) -> np.ndarray:
    """Share tokens in proportion to the weights, `most` a head at most; exact, in integers.

    Heads fill up in the order of their weights. A full head takes no more than its part, so the
    others' parts do not shrink: heads of equal weight fill up together. If a head does not fill up,
    no lighter one does: how many are full is found by bisection.

    Args:
        weights: weights of the heads, int64 ``[heads]``, larger than 0.
        tokens: tokens to share, at most `most` for each head.
        most: tokens of a full head.

    Returns:
        int64 ``[heads]``; the total is `tokens`.
    """
    order = np.sort(weights)
    total_up_to = order.cumsum()
    heads = len(order)

    def rest_after(full: int) -> tuple[int, int, int]:
        """Weight of the heaviest of the rest, their total weight, and tokens left for them."""
        last = heads - 1 - full
        return int(order[last]), int(total_up_to[last]), tokens - full * most

    def stays_open(full: int) -> bool:
        heaviest, total, left = rest_after(full)
        return heaviest * left < most * total

    full = bisect_left(range(heads), True, key=stays_open)
    kept = np.full(heads, most)
    if full == heads:
        return kept
    heaviest, total, left = rest_after(full)
    rest = weights <= heaviest
    # Python's integers where a product would not fit: only beside budgets of millions of tokens.
    number = np.int64 if heaviest * left < 2**63 else object
    parts = weights[rest].astype(number) * left
    shares, remainders = parts // total, parts % total
    spare = left - int(shares.sum())
    shares[np.argsort(-remainders, kind="stable")[:spare]] += 1
    kept[rest] = shares
    return kept
