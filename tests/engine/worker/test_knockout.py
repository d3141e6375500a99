"""Heads that a request does without, for causal scores."""

import numpy as np
import pytest
import torch

from sparsemm_vllm.engine.worker.probes.knockout import Knockout, Knockouts, attend_without

OWN = slice(2, 4), slice(4, 6)  # pruned layers and KV heads of this rank


def steps(wanted: list[int], prompt_tokens: int, chunks: list[int]) -> list[list[Knockout]]:
    """What a request asks of each of its chunks, beside another request of three queries."""
    knockouts = Knockouts(OWN, window=4)
    knockouts.add(7, prompt_tokens, wanted)
    knockouts.add(3, prompt_tokens, None)
    ends = np.cumsum(chunks)
    return [
        knockouts.of_step(np.array([3, 7]), np.array([0, 3, 3 + size]), np.array([50, end]))
        for size, end in zip(chunks, ends, strict=True)
    ]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([14], [(13, 10, 4)]),  # query 13 of the step is position 10
        ([10, 4], [None, (3, 10, 4)]),  # the chunk ends with the question
        ([9, 2, 3], [None, (4, 10, 1), (3, 11, 3)]),
        ([13, 1], [(13, 10, 3), (3, 13, 1)]),  # one token, which vLLM runs as a decode
    ],
)
def test_queries_behind_the_question(
    chunks: list[int], expected: list[tuple[int, int, int] | None]
) -> None:
    found = steps([3, 4, 10], 14, chunks)
    whole = [e and Knockout(1, 0, 1, *e, first_key=6) for e in expected]
    assert found == [[k] if k else [] for k in whole]


@pytest.mark.parametrize(("layer", "head"), [(1, 4), (4, 4), (2, 3), (2, 6)])
def test_heads_of_other_ranks(layer: int, head: int) -> None:
    assert steps([layer, head, 10], 14, [14]) == [[]]


def test_an_index_is_used_again() -> None:
    knockouts = Knockouts(OWN, window=4)
    knockouts.add(7, 14, [2, 4, 10])
    knockouts.add(7, 14, None)
    assert knockouts.of_step(np.array([7]), np.array([0, 14]), np.array([14])) == []


@pytest.mark.parametrize("n", [3, 14])
def test_without_window_or_answer(n: int) -> None:
    with pytest.raises(ValueError, match="do not fit into 14 tokens"):
        Knockouts(OWN, window=4).add(7, 14, [2, 4, n])


@pytest.mark.parametrize("G", [1, 4])
def test_attention_over_the_window_only(G: int) -> None:
    """Against a mask over all keys; other heads and queries stay as they were."""
    torch.manual_seed(G)
    P, Hkv, D, n, end = 4, 3, 8, 10, 14
    cache = torch.full((9, Hkv, P, 2 * D), torch.nan)
    table = torch.tensor([[8, 8, 8, 8], [6, 2, 5, 1]], dtype=torch.int32)
    kv = torch.randn(end, Hkv, 2 * D)
    for position in range(end):
        cache[table[1, position // P].item(), :, position % P] = kv[position]
    query = torch.randn(3 + end, Hkv * G, D)
    before = torch.randn(3 + end, Hkv * G, D)
    output = before.clone()
    knockout = Knockout(0, 2, 1, query=3 + n, position=n, count=end - n, first_key=n - 3)
    attend_without(query, cache, table, knockout, output, 0.3)

    heads = slice(2 * G, 3 * G)
    for position in range(n, end):
        seen = slice(n - 3, position + 1)
        logits = 0.3 * query[3 + position, heads] @ kv[seen, 2, :D].T
        expected = logits.softmax(-1) @ kv[seen, 2, D:]
        torch.testing.assert_close(output[3 + position, heads], expected)
    output[3 + n : 3 + end, heads] = before[3 + n : 3 + end, heads]
    assert torch.equal(output, before)
