"""Synthetic head profiles, as concentrated as the published ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparsemm_vllm.budget.profile import HeadProfile

# What the top 5 % and the top 10 % of the heads hold of the published scores of LLaVA-NeXT.
CONCENTRATION = ((0.05, 0.55), (0.10, 0.77))
BISECTIONS = 60


def _bisect(too_low: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return (low + high) / 2


def top_mass(scores: np.ndarray, share: float) -> float:
    """What this share of the heads, those with the highest scores, holds of the mass."""
    ordered = np.sort(scores, axis=None)[::-1]
    return float(ordered[: round(share * ordered.size)].sum() / ordered.sum())


def concentrated_scores(layers: int, query_heads: int, seed: int) -> torch.Tensor:
    """Scores ``[L, Hq]`` that sum to 1, in random order, float64.

    They fall with the rank as ``exp(-rate * rank**power)``, whose two parameters follow from
    `CONCENTRATION`. A power law of the rank, which meets one condition, has too heavy a tail.
    """
    rank = np.arange(1, layers * query_heads + 1)
    (few, mass_of_few), (more, mass_of_more) = CONCENTRATION

    def law(power: float) -> np.ndarray:
        def scores(rate: float) -> np.ndarray:
            return np.exp(-rate * rank**power)

        return scores(_bisect(lambda rate: top_mass(scores(rate), few) < mass_of_few, 0.0, 10.0))

    scores = law(_bisect(lambda power: top_mass(law(power), more) < mass_of_more, 0.1, 2.0))
    shuffled = np.random.default_rng(seed).permutation(scores / scores.sum())
    return torch.from_numpy(shuffled.reshape(layers, query_heads))


def synthetic_profile(
    model_id: str, layers: int, query_heads: int, kv_heads: int, seed: int = 0, **known: Any
) -> HeadProfile:
    """A profile of no model's heads, and one that says so.

    Args:
        model_id: name of the model, which follows the word "synthetic".
        layers: number of layers, `L`.
        query_heads: query heads of a layer, `Hq`.
        kv_heads: KV heads of a layer, `Hkv`.
        seed: seed of the order of the scores.
        known: other fields of the profile, by name.
    """
    masses = ", ".join(f"top {share:.0%} of heads {mass:.0%}" for share, mass in CONCENTRATION)
    return HeadProfile(
        model_id=f"synthetic, for {model_id}",
        num_layers=layers,
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        seed=seed,
        provenance={"method": f"synthetic: no scores were measured; of the mass, {masses}"},
        scores=tuple(map(tuple, concentrated_scores(layers, query_heads, seed).tolist())),
        **known,
    )
