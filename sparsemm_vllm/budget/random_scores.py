"""Random scores of tokens, the same on every machine."""

import torch

_BITS = 0xFFFFFFFF  # of the numbers that are hashed


def random_scores(
    seed: int,
    layer: int,
    heads: range,
    tokens: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Random scores of a prompt's tokens, the same on every machine and for every split of heads.

    Hashes of seed, layer, head and position, so that no generator has a state to keep.

    Args:
        seed: seed of the request; its lowest 64 bits count. The same request keeps the same tokens
            only if the seed is made from what it asks, not from when or in which batch it came.
        layer: index of the layer in the whole model, not in a pipeline stage.
        heads: indices, in the whole layer, of this rank's KV heads.
        tokens: number of tokens to score, ``n - W``.
        device: device that holds the result.

    Returns:
        float32 ``[len(heads), tokens]``, multiples of ``2**-24`` from 0 on, less than 1.
    """
    head = torch.arange(heads.start, heads.stop, heads.step, device=device)[:, None]
    state = torch.full_like(head, 0x9E3779B9)  # not 0, which the hash leaves as it is
    for word in (seed & _BITS, seed >> 32 & _BITS, layer, head):
        state = _hash(state ^ word)
    position = torch.arange(tokens, device=device)[None]
    return (_hash(state ^ _hash(position)) >> 8).float() * 2.0**-24


def _hash(x: torch.Tensor) -> torch.Tensor:
    """32 mixed bits from 32, in int64. Source: https://github.com/skeeto/hash-prospector."""
    x = _multiply(x ^ x >> 16, 0x7FEB352D)
    x = _multiply(x ^ x >> 15, 0x846CA68B)
    return x ^ x >> 16


def _multiply(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The low 32 bits of a product of 32-bit numbers, in parts that int64 holds."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor & 0xFFFF
    return low + (high << 16) & _BITS
