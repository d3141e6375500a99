"""Kept sets of the published implementation, token for token."""

import numpy as np
import pytest
import torch

from sparsemm_vllm.budget.capacities import head_capacities
from sparsemm_vllm.triton_kernels.reference import kept_tokens, window_scores
from support.golden import KEPT_WHOLE, LAYERS, PRUNED, RHO, Case, differs_by_ties_only


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("number", [*PRUNED, KEPT_WHOLE])
def test_capacities(number, layer):
    case = Case(number)
    ours = head_capacities(case.head_scores, case.Hkv, case.budget, case.window, RHO)
    published = case.data[f"sparsemm_layer{layer}_capacity"]
    np.testing.assert_array_equal(ours[layer].numpy(), published)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("number", PRUNED)
def test_kept_sets(number, layer):
    case = Case(number)
    layout, scores = case.layout(), case.scores()
    assert layout.is_pruned(case.n)
    window = set(range(case.n - case.window, case.n))
    ours = kept_tokens(scores, torch.tensor(layout.capacities[layer]))
    published = case.kept(layer)
    assert len({len(head) for head in published}) > 1, "heads of equal length prove nothing here"
    for head, positions in enumerate(ours):
        mine = set(positions.tolist())
        assert len(mine) == len(positions)
        assert differs_by_ties_only(mine | window, published[head], scores[head]), f"head {head}"
        assert len(mine) == layout.kept_tokens(case.n)[layer, head]


@pytest.mark.parametrize("number", PRUNED)
def test_even_budgets_are_snapkv(number):
    """Same scores, other capacities: each head the base budget."""
    case = Case(number)
    base, window = case.budget - case.window, set(range(case.n - case.window, case.n))
    scores = case.scores()
    ours = kept_tokens(scores, torch.full((case.Hkv,), base))
    for head, theirs in enumerate(case.data["snapkv_kept"]):
        mine = set(ours[head].tolist()) | window
        assert differs_by_ties_only(mine, set(theirs.tolist()), scores[head]), f"head {head}"


def test_a_budget_larger_than_the_prompt_keeps_everything():
    case = Case(KEPT_WHOLE)
    layout = case.layout()
    assert not layout.is_pruned(case.n)
    assert layout.compact_blocks(case.n, block_size=16) == 0
    assert layout.freed_blocks(case.n, block_size=16) == 0
    for layer in range(LAYERS):
        assert case.kept(layer) == [set(range(case.n))] * case.Hkv


def test_a_wrong_pooling_is_noticed():
    """The tie rule is no loophole: another kernel size gives sets that differ by more."""
    case = Case(0)
    scores = window_scores(case.q[:, case.n - case.window :], case.k, case.pool_kernel + 2)
    window = set(range(case.n - case.window, case.n))
    ours = kept_tokens(scores, torch.tensor(case.layout().capacities[0]))
    published = case.kept(0)
    assert not all(
        differs_by_ties_only(set(mine.tolist()) | window, published[head], scores[head])
        for head, mine in enumerate(ours)
    )
