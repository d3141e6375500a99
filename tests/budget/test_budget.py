"""Capacities: the published table, what must add up, and what must be refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_vllm.budget.capacities import head_capacities
from sparsemm_vllm.budget.layout import CacheLayout

TABLES = [
    (budget, rho, group)
    for budget in (64, 128, 256, 512, 1024, 2048)
    for rho in (0.1, 0.3)
    for group in (1, 4)
]
# Few heads with most of the mass, and one head without any.
SCORES = torch.tensor([[0.0, 3.0, 1.0, 4.0], [90.0, 0.5, 0.25, 1.0], [2.0, 2.0, 7.0, 0.125]])

score_tables = st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 4, 7])).flatmap(
    lambda shape: (
        st.lists(
            st.lists(
                st.floats(0, 1e6, allow_subnormal=False),
                min_size=shape[1] * shape[2],
                max_size=shape[1] * shape[2],
            ),
            min_size=shape[0],
            max_size=shape[0],
        )
        .filter(lambda rows: sum(map(sum, rows)) > 0)
        .map(lambda rows: (torch.tensor(rows, dtype=torch.float64), shape[1]))
    )
)


@pytest.mark.parametrize(("budget", "rho", "group"), TABLES)
def test_published_table(published, budget, rho, group):
    scores, tables = published
    ours = head_capacities(scores, 32 // group, budget, rho=rho)
    assert ours.dtype == torch.int32
    np.testing.assert_array_equal(ours.numpy(), tables[f"budget{budget}_ratio{rho}_group{group}"])


def test_no_published_table_is_left_out(published):
    _, tables = published
    assert {f"budget{b}_ratio{r}_group{g}" for b, r, g in TABLES} == set(tables.files)


@given(score_tables, st.integers(1, 64), st.integers(1, 4000), st.floats(0, 1))
def test_total_is_the_budget_up_to_rounding(table, window, base, rho):
    scores, Hkv = table
    capacities = head_capacities(scores, Hkv, window + base, window, rho)
    assert capacities.shape == (scores.shape[0], Hkv)
    # Each head rounds once, by at most half a token.
    assert abs(int(capacities.sum()) - base * capacities.numel()) <= capacities.numel() / 2
    assert int(capacities.min()) >= int(rho * base)
    assert int(capacities.max()) >= 1, "a pruned request without head pages would pass for a dense"


@given(score_tables, st.integers(1, 4000), st.floats(0, 1))
def test_heads_of_a_group_count_together(table, base, rho):
    scores, Hkv = table
    summed = scores.reshape(scores.shape[0], Hkv, -1).sum(-1)
    grouped = head_capacities(scores, Hkv, 32 + base, 32, rho)
    alone = head_capacities(summed, Hkv, 32 + base, 32, rho)
    assert (grouped - alone).abs().max() <= 1  # the order of a sum moves a tie


def test_group_order_is_that_of_consecutive_query_heads():
    """Query heads 0 and 1 share KV head 0: an interleaved order would give other numbers."""
    capacities = head_capacities(SCORES, 2, 132, 32, rho=0.0)
    share = SCORES.double() / SCORES.double().sum() * 100 * 6
    assert capacities.tolist() == [
        [round(float(a + b)), round(float(c + d))] for a, b, c, d in share
    ]


def test_rho_zero_shares_by_score_alone():
    capacities = head_capacities(SCORES, 4, 132, 32, rho=0.0)
    assert capacities[0, 0] == 0
    expected = SCORES.double() / SCORES.double().sum() * 100 * SCORES.numel()
    assert (capacities - expected).abs().max() <= 0.5


def test_rho_one_is_even():
    assert (head_capacities(SCORES, 4, 132, 32, rho=1.0) == 100).all()


def test_floor_is_rounded_down():
    """rho * base = 9.9: every head gets 9, the head without a score nothing more."""
    assert head_capacities(SCORES, 4, 131, 32, rho=0.1)[0, 0] == 9


def test_scale_of_the_scores_does_not_matter():
    ours = head_capacities(SCORES, 4, 256)
    torch.testing.assert_close(head_capacities(SCORES * 1024, 4, 256), ours, rtol=0, atol=0)


def test_scores_are_left_as_they_are():
    before = SCORES.clone()
    head_capacities(SCORES, 2, 256)
    assert torch.equal(SCORES, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": -1}, "window is -1"),
        ({"budget": 32}, r"budget \(32 tokens\) must be larger than the window \(32\)"),
        ({"budget": 31}, r"budget \(31 tokens\)"),
        ({"rho": -0.001}, "rho is -0.001"),
        ({"rho": 1.001}, "rho is 1.001"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"scores": SCORES[0]}, r"got \[4\]"),
        ({"scores": SCORES[None]}, r"got \[1, 3, 4\]"),
        ({"num_kv_heads": 3}, r"multiple of 3 KV heads, got \[3, 4\]"),
        ({"num_kv_heads": 8}, r"multiple of 8 KV heads, got \[3, 4\]"),
        ({"scores": SCORES - 1}, "finite and not negative"),
        ({"scores": SCORES / 0}, "finite and not negative"),
        ({"scores": SCORES * torch.inf}, "finite and not negative"),
        ({"scores": SCORES * 0}, "all zero"),
    ],
)
def test_refused(change, message):
    arguments = {"scores": SCORES, "num_kv_heads": 4, "budget": 256, "window": 32, "rho": 0.1}
    head_capacities(**arguments)
    with pytest.raises(ValueError, match=message) as refusal:
        head_capacities(**(arguments | change))
    assert "\n" not in str(refusal.value)


def test_scores_whose_sum_overflows_are_refused():
    """Each is finite; shares of an infinite total would all be zero."""
    scores = torch.full((2, 4), 1e308, dtype=torch.float64)
    with pytest.raises(ValueError, match="finite"):
        head_capacities(scores, 4, 256)


def test_a_budget_beyond_32_bits_does_not_wrap_around():
    """32 x 32 heads, one with all of the mass, and a budget meant as `keep everything`."""
    scores = torch.zeros(32, 32)
    scores[3, 5] = 1.0
    capacities = head_capacities(scores, 32, 10_000_000)
    assert capacities.min() >= 0
    assert capacities[3, 5] == capacities.max()


def test_figures_of_the_readme(published):
    """What the README says of the published scores at a budget of 256."""
    layout = CacheLayout.from_scores(published[0], 32, budget=256)
    kept = layout.kept_tokens(3072) + layout.window
    assert layout.held_blocks(3072, 3072, block_size=16) == 17
    assert (kept.max(), np.median(kept)) == (3072, 66)
