"""How many prompt tokens each KV head keeps: a pure function of scores and settings.

Source: SparseMM (ICCV 2025), https://arxiv.org/abs/2506.05344, the asymmetric budget allocation.
"""

import torch


def head_capacities(
    scores: torch.Tensor, num_kv_heads: int, budget: int, window: int = 32, rho: float = 0.1
) -> torch.Tensor:
    """Capacity of each KV head: prompt tokens it keeps besides the window, uncapped by the prompt.

    Every head gets the floor ``int(rho * base)`` of the base budget ``base = budget - window``; the
    rest of ``L * Hkv * base`` is shared in proportion to the heads' scores, summed over each GQA
    group.

    Args:
        scores: visual scores ``[L, Hq]``, not negative, not all zero.
        num_kv_heads: KV heads of a layer, `Hkv`; a divisor of `Hq`.
        budget: tokens per KV head on average, the window included.
        window: number of last prompt tokens that every head keeps, `W`.
        rho: share of the base budget that is spread evenly, 0 to 1.

    Returns:
        int32 ``[L, Hkv]``, in tokens.

    Raises:
        ValueError: for a budget not larger than the window, a window below 1, rho outside 0 to 1,
            scores of another shape, negative, not finite or all zero.
    """
    if window < 1:
        raise ValueError(f"window is {window} tokens; it must be at least 1")
    if budget <= window:
        raise ValueError(f"budget ({budget} tokens) must be larger than the window ({window})")
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho is {rho}; it must lie between 0 and 1")
    if scores.ndim != 2 or scores.shape[1] % num_kv_heads:
        raise ValueError(
            f"scores must be [layers, query heads] with query heads a multiple of {num_kv_heads} "
            f"KV heads, got {list(scores.shape)}"
        )
    scores = scores.to(torch.float64)  # float32 rounds one of the published capacities otherwise
    total = scores.sum()
    if not torch.isfinite(total) or (scores < 0).any():
        raise ValueError("scores (and their sum) must be finite and not negative")
    if total <= 0:
        raise ValueError("scores are all zero: there is nothing to share the budget by")

    L, Hq = scores.shape
    share = (scores / total).reshape(L, num_kv_heads, Hq // num_kv_heads).sum(-1)
    base = budget - window
    floor = int(rho * base)
    shared_tokens = (base - floor) * L * num_kv_heads
    return torch.round(share * shared_tokens + floor).clamp(max=2**31 - 1).to(torch.int32)
