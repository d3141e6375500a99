"""AdaKV's split of a layer's budget among its heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE

from sparsemm_vllm.budget.methods import adakv_split, adakv_total
from sparsemm_vllm.budget.random_scores import random_scores


def test_split_of_an_example():
    """Of 4 tokens head 0, whose attention is sharp, wins one, the head that needs more wins three.

    Their weights are 0.93 and 0.37: 0.84 | 0.07, 0.06, 0.06 are the best.
    """
    scores = torch.tensor(
        [[0.01, 0.9, 0.02, 0.02, 0.03, 0.02], [0.16, 0.17, 0.17, 0.2, 0.15, 0.15]]
    )
    assert adakv_split(scores, 2, floor_share=0.0).tolist() == [1, 3]
    # Half of it even: round(0.5 * 1 + 1) and round(0.5 * 3 + 1), halves to the even number.
    assert adakv_split(scores, 2, floor_share=0.5).tolist() == [2, 2]


def test_split_is_weighted():
    """Weights 1.1 / 1.5 and 1 / 2 put head 0's 0.4 before head 1's 0.5, otherwise it is 2 and 2."""
    scores = torch.tensor([[0.6, 0.5, 0.4, 0.0], [0.5, 0.5, 0.5, 0.5]])
    assert adakv_split(scores, 2, floor_share=0.0).tolist() == [3, 1]


def test_split_weighs_by_as_many_tokens_as_the_budget():
    """Weights 0.5 and 0.45 leave each head its best; by two tokens, 0.8 and 0.9, it is 0 and 2."""
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.45, 0.1]])
    assert adakv_split(scores, 1, floor_share=0.0).tolist() == [1, 1]


def test_split_counts_equal_scores_by_rank():
    """Heads without any preference share evenly, none is starved for coming last."""
    assert adakv_split(torch.ones(3, 50), 7, floor_share=0.0).tolist() == [7, 7, 7]
    assert adakv_split(torch.ones(3, 50), 7).tolist() == [7, 7, 7]  # round(5.6 + 1)


def test_split_of_heads_that_see_the_window_only():
    scores = torch.zeros(2, 10)
    assert adakv_split(scores, 4, floor_share=0.0).tolist() == [4, 4]
    scores[1] = torch.arange(10)
    assert adakv_split(scores, 4, floor_share=0.0).tolist() == [0, 8]


layer_scores = st.tuples(st.integers(1, 9), st.integers(1, 400), st.integers(0, 2**32)).map(
    lambda args: random_scores(args[2], 0, range(args[0]), args[1]) ** 6
)


@settings(max_examples=200)
@given(layer_scores, st.data(), st.floats(0, 1))
def test_split_keeps_the_total(scores, data, floor_share):
    Hkv, older = scores.shape
    base = data.draw(st.integers(1, older))
    split = adakv_split(scores, base, floor_share)
    floor = int(floor_share * base)
    assert split.dtype == torch.int32
    assert split.shape == (Hkv,)
    assert split.min() >= floor
    assert split.max() <= older
    exact = Hkv * ((1 - floor_share) * base + floor)
    assert abs(int(split.sum()) - exact) <= Hkv / 2 + 1e-3
    assert split.sum() <= adakv_total(Hkv, base, floor_share) <= Hkv * (base + 0.5)
    assert adakv_split(scores, base, 0.0).sum() == Hkv * base
    assert (adakv_split(scores, base, 1.0) == base).all()


@given(layer_scores, st.data())
def test_split_follows_the_heads(scores, data):
    """Heads in another order get what they got: positions and neighbours do not matter."""
    Hkv, older = scores.shape
    base = data.draw(st.integers(1, older))
    order = data.draw(st.permutations(range(Hkv)))
    shuffled = scores[:, data.draw(st.permutations(range(older)))][order]
    # Sums in another order differ in the last bit, which moves one token of a near tie.
    differences = adakv_split(shuffled, base, 0.0) - adakv_split(scores, base, 0.0)[order]
    assert differences.abs().max() <= 1


def test_split_leaves_the_scores_as_they_are():
    scores = random_scores(0, 0, range(4), 100, DEVICE)
    before = scores.clone()
    assert adakv_split(scores, 20).device.type == DEVICE.type
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("base", "floor_share", "message"),
    [
        (11, 0.2, "base is 11; it must lie between 1 and the 10 tokens scored"),
        (0, 0.2, "base is 0"),
        (5, -0.1, "floor_share is -0.1"),
        (5, 1.1, "floor_share is 1.1"),
        (5, float("nan"), "floor_share is nan"),
    ],
)
def test_split_refuses(base, floor_share, message):
    with pytest.raises(ValueError, match=message):
        adakv_split(torch.ones(2, 10), base, floor_share)


def test_split_of_all_there_is():
    assert adakv_split(torch.ones(2, 10), 10).tolist() == [10, 10]
