"""The torch twins that score and select, against plain loops in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_vllm.triton_kernels.reference import kept_tokens, select_tokens, window_scores
from support.plain_requests import TOLERANCE, D


def slow_window_scores(query, key, kernel_size):
    """The definition, one number at a time."""
    (Hq, W, size), (Hkv, n, _) = query.shape, key.shape
    q, k = query.double().numpy(), key.double().numpy()
    mean = np.zeros((Hkv, n - W))
    for head, i in itertools.product(range(Hq), range(W)):
        group = head // (Hq // Hkv)
        logits = [float(q[head, i] @ k[group, j]) / math.sqrt(size) for j in range(n - W + i + 1)]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        for j in range(n - W):
            mean[group, j] += weights[j] / sum(weights) / W / (Hq // Hkv)
    pooled = np.zeros_like(mean)
    for j, shift in itertools.product(range(n - W), range(kernel_size)):
        at = j + shift - kernel_size // 2
        if 0 <= at < n - W:
            pooled[:, j] += mean[:, at] / kernel_size
    return torch.from_numpy(pooled).float()


@pytest.mark.parametrize(
    ("Hkv", "G", "n", "W", "kernel_size"),
    [
        (2, 1, 20, 4, 5),
        (2, 4, 21, 4, 5),
        (1, 7, 21, 8, 3),  # a group that is no power of two
        (2, 2, 20, 4, 1),  # no pooling
        (2, 2, 9, 1, 5),  # a single window query
        (2, 2, 7, 4, 7),  # fewer older tokens than the pooling is wide
        (2, 2, 5, 4, 5),  # one older token
        (2, 2, 4, 4, 5),  # none: the window is the prompt
    ],
)
def test_window_scores(Hkv, G, n, W, kernel_size):
    torch.manual_seed(1)
    query, key = torch.randn(Hkv * G, W, D), torch.randn(Hkv, n, D) * 2
    scores = window_scores(query, key, kernel_size)
    assert scores.shape == (Hkv, n - W)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, slow_window_scores(query, key, kernel_size), **TOLERANCE)


def test_window_scores_of_half_precision_are_float32():
    torch.manual_seed(1)
    query, key = torch.randn(4, 4, D).bfloat16(), torch.randn(2, 20, D).bfloat16()
    torch.testing.assert_close(
        window_scores(query, key), slow_window_scores(query.float(), key.float(), 5), **TOLERANCE
    )


def test_window_scores_take_a_scale_and_change_nothing():
    torch.manual_seed(1)
    query, key = torch.randn(4, 4, D), torch.randn(2, 20, D)
    before = query.clone(), key.clone()
    scaled = window_scores(query, key, scale=0.5)
    torch.testing.assert_close(scaled, window_scores(query * 0.5 * D**0.5, key), **TOLERANCE)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


@pytest.mark.parametrize(
    ("query", "key", "kernel_size", "message"),
    [
        ((4, 4, 8), (2, 20, 16), 5, "must share D"),
        ((4, 4, 8), (3, 20, 8), 5, "multiple of Hkv"),
        ((4, 4, 8), (2, 3, 8), 5, "n must be at least W"),
        ((4, 4, 8), (2, 20, 8), 4, "kernel_size is 4"),
        ((4, 4, 8), (2, 20, 8), 0, "kernel_size is 0"),
        ((4, 4, 8), (2, 20, 8), -1, "kernel_size is -1"),
    ],
)
def test_window_scores_refuse(query, key, kernel_size, message):
    with pytest.raises(ValueError, match=message):
        window_scores(torch.zeros(query), torch.zeros(key), kernel_size)


# select_tokens


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    selected = select_tokens(scores, torch.tensor([3, 2]), width=3)
    assert selected.tolist() == [[0, 1, 4], [0, 1, 5]]


def test_ties_in_a_long_row():
    """A sort that is not stable shows only beyond a few dozen equal values."""
    selected = select_tokens(torch.ones(2, 5000), torch.tensor([4000, 17]), width=4000)
    assert torch.equal(selected[0], torch.arange(4000))
    assert selected[1, :17].tolist() == list(range(17))
    assert (selected[1, 17:] == 5000).all()


def test_heads_without_capacity_and_beyond_the_prompt():
    scores = torch.tensor([[3.0, 1.0, 2.0]] * 4)
    selected = select_tokens(scores, torch.tensor([0, 1, 3, 500]), width=3)
    assert selected.dtype == torch.int64
    assert selected.tolist() == [[3, 3, 3], [0, 3, 3], [0, 1, 2], [0, 1, 2]]


def test_width_is_cut_to_the_tokens_there_are():
    assert select_tokens(torch.rand(2, 3), torch.tensor([9, 1]), width=9).shape == (2, 3)
    assert select_tokens(torch.rand(2, 0), torch.tensor([9, 1]), width=9).shape == (2, 0)
    assert select_tokens(torch.rand(2, 3), torch.tensor([0, 0]), width=0).shape == (2, 0)


@given(
    st.integers(0, 40).flatmap(
        lambda m: st.lists(
            st.tuples(st.lists(st.integers(0, 5), min_size=m, max_size=m), st.integers(0, m + 3)),
            min_size=1,
            max_size=5,
        )
    )
)
def test_selection_by_sorting_tuples(heads):
    """Few distinct scores: nearly all of them tie."""
    scores = torch.tensor([values for values, _ in heads], dtype=torch.float32)
    capacities = torch.tensor([capacity for _, capacity in heads])
    expected = [
        sorted(sorted(range(len(values)), key=lambda j: (-values[j], j))[:capacity])
        for values, capacity in heads
    ]
    kept = kept_tokens(scores, capacities)
    assert [head.tolist() for head in kept] == expected
    width = max(map(len, expected))
    padded = [head + [scores.shape[1]] * (width - len(head)) for head in expected]
    assert select_tokens(scores, capacities, width).tolist() == padded
