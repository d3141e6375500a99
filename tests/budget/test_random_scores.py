"""Random scores: hashes, the same on every machine and rank."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE

from sparsemm_vllm.budget.random_scores import random_scores
from sparsemm_vllm.triton_kernels.reference import kept_tokens


def lowbias32(x):
    """The hash in plain integers."""
    x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
    x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
    return x ^ x >> 16


@given(st.integers(0, 2**64 - 1), st.integers(0, 200), st.integers(0, 200), st.integers(0, 10**5))
def test_random_scores_are_hashes(seed, layer, head, position):
    state = 0x9E3779B9
    for word in (seed % 2**32, seed >> 32, layer, head):
        state = lowbias32(state ^ word)
    expected = (lowbias32(state ^ lowbias32(position)) >> 8) / 2**24
    scores = random_scores(seed, layer, range(head, head + 1), position + 1)
    assert scores.dtype == torch.float32
    assert scores[0, -1].item() == expected


def test_random_scores_of_any_machine():
    """The numbers themselves, so that nothing may ever move them."""
    ours = random_scores(1, 2, range(3, 5), 3, DEVICE) * 2**24
    assert ours.device.type == DEVICE.type
    assert ours.tolist() == [[10693211, 14087163, 2777352], [9974318, 2225532, 16044793]]


@given(st.integers(-(2**63), 2**63), st.integers(0, 50), st.integers(1, 60))
def test_random_scores_do_not_depend_on_the_rank(seed, layer, tokens):
    """Ranks own slices of the heads; a longer prompt begins with the same numbers."""
    whole = random_scores(seed, layer, range(8), tokens)
    assert torch.equal(random_scores(seed, layer, range(4, 8), tokens), whole[4:])
    assert torch.equal(random_scores(seed, layer, range(8), tokens + 9)[:, :tokens], whole)


def test_random_scores_differ_wherever_they_should():
    changed = [
        random_scores(seed, layer, range(head, head + 1), 500)
        for seed in (0, 1, 2**32, 2**40)
        for layer in (0, 1)
        for head in (0, 1)
    ]
    scores = torch.cat(changed)
    assert len(scores.unique(dim=0)) == len(scores)
    # Correlation of independent rows of 500: 5 standard deviations are 0.22.
    correlation = torch.corrcoef(scores) - torch.eye(len(scores))
    assert correlation.abs().max() < 0.22


def test_random_scores_are_spread_evenly():
    scores = random_scores(7, 3, range(32), 4096)
    assert 0 <= scores.min() < 1e-4
    assert 0.9999 < scores.max() < 1
    counts = torch.histc(scores, 16, 0, 1) / scores.numel() * 16
    assert (counts - 1).abs().max() < 0.06  # 5 standard deviations
    kept = torch.cat(kept_tokens(scores, torch.full((32,), 512))).float()
    assert abs(kept.mean() - 2047.5) < 50  # no end of the prompt is preferred
