"""Prompts with the kept sets of the published implementation, from shared/golden."""

import numpy as np
import pytest
import torch

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.methods import Budget
from sparsemm_vllm.triton_kernels.reference import window_scores
from support.paths import GOLDEN

RHO, LAYERS = 0.1, 2  # what the data was made with, see its README
PRUNED, KEPT_WHOLE = (0, 1, 2, 3), 4
TIE = 1e-6

# Published names of the kept sets; `random` and `random_heads` have none.
KEPT_SETS = {
    "sparsemm": "sparsemm_layer{}",
    "snapkv": "snapkv",
    "pyramidkv": "pyramidkv_layer{}",
    "adakv": "adakv",
}


class Case:
    def __init__(self, number):
        path = GOLDEN / f"selection_{number}.npz"
        if not path.is_file():
            pytest.skip("golden data is not beside this checkout")
        data = np.load(path)
        self.data = data
        self.q, self.k = torch.from_numpy(data["q"]), torch.from_numpy(data["k"])
        self.window, self.pool_kernel = int(data["window"]), int(data["kernel_size"])
        self.budget = int(data["budget"])
        self.n, self.Hkv = self.q.shape[1], self.k.shape[0]
        self.head_scores = torch.from_numpy(data["head_score"]).reshape(LAYERS, -1)

    def layout(self):
        return CacheLayout.from_scores(
            self.head_scores, self.Hkv, self.budget, self.window, RHO, pool_kernel=self.pool_kernel
        )

    def scores(self):
        return window_scores(self.q[:, self.n - self.window :], self.k, self.pool_kernel)

    def kept(self, layer):
        """Published positions of each head."""
        lens, kept = (self.data[f"sparsemm_layer{layer}_{part}"] for part in ("lens", "kept"))
        assert lens.sum() == len(kept)
        return [set(head.tolist()) for head in np.split(kept, lens.cumsum()[:-1])]


def differs_by_ties_only(ours, theirs, scores):
    """Whether the positions that only one of the sets has all score the same."""
    swapped = sorted(ours ^ theirs)
    if len(ours) != len(theirs) or not swapped:
        return ours == theirs
    values = scores[swapped]
    return bool(values.max() - values.min() < TIE)


def published_kept(case, name, layer):
    """Kept positions of each head, as a list of sets."""
    stem = KEPT_SETS[name].format(layer)
    kept = torch.from_numpy(case.data[f"{stem}_kept"])
    if kept.ndim == 1:  # of unequal heads, one after the other
        kept = kept.split(case.data[f"{stem}_lens"].tolist())
    return [set(head.tolist()) for head in kept]


def capacities_of(method, budget, n):
    """Of all heads, for a prompt that is pruned."""
    capacities = method.capacities(budget)
    older = n - budget.window
    return method.shorten(capacities, budget.base, older) if method.shorten else capacities


def lengths_of(method, budget, layer, n, scores):
    """Tokens besides the window of each head of a layer, for a prompt that is pruned."""
    split = method.split
    return split(scores, budget.base) if split else capacities_of(method, budget, n)[layer]


def golden_budget(case):
    return Budget(case.head_scores, case.Hkv, case.budget, case.window, RHO)
