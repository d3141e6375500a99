"""Addresses in the paged KV cache."""

import torch


def cache_units(cache: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of the cache's layers, blocks, heads and tokens, in units of a token's elements.

    Args:
        cache: keys and values, ``[L, B, Hkv, P, 2 * D]``; only its strides count.

    Raises:
        ValueError: if a token's keys and values do not lie side by side at a multiple of their
            size, or if 32 bits do not hold the cache's units.
    """
    width = cache.shape[4]
    *strides, last = cache.stride()
    if last != 1 or any(stride % width for stride in strides):
        raise ValueError(
            f"strides {[*strides, last]} of a cache {list(cache.shape)} [L, B, Hkv, P, 2 * D]: "
            f"each but the last must be a multiple of {width}, the last 1"
        )
    layer, block, head, token = (stride // width for stride in strides)
    units = layer, block, head, token
    most = sum((size - 1) * unit for size, unit in zip(cache.shape, units, strict=False))
    if most >= 2**31:
        raise ValueError(f"a cache of {most} tokens times heads: 32 bits do not hold them")
    return units
