"""The torch twins against plain loops in float64, on a striped cache poisoned with NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.triton_kernels.reference import compact_kv, dense_attention, read_tokens
from support.plain_requests import (
    INDEX,
    TOLERANCE,
    D,
    Scene,
    as_integers,
    head_lengths,
    make_state,
    page_slots,
)

# The cache


@pytest.mark.parametrize("order", ["lbnhc", "lbhnc", "blhnc"])  # vLLM's layouts
@pytest.mark.parametrize("P", [16, 32])
def test_read_tokens_before_and_behind_the_compact_blocks(P, order):
    n = 9 * P + 5  # ends inside a block
    scene = Scene(head_lengths(P), n, W=4, P=P, generated=2 * P, order=order)
    scene.prune()
    scene.decode()
    held = torch.arange((n - 4) // P * P, scene.seq_len)[torch.randperm(n % P + 2 * P)]
    for layer in range(scene.L):
        tokens = read_tokens(scene.cache[layer], scene.row, held, scene.N, scene.C)
        assert torch.equal(tokens, scene.kv[layer][:, held])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["lbnhc", "lbhnc"])
@pytest.mark.parametrize("P", [16, 32])
@pytest.mark.parametrize("edge", [-1, 0, 1])  # n is a multiple of P, or one token off
def test_compaction_writes_head_pages_and_nothing_else(edge, P, order, dtype):
    scene = Scene(head_lengths(P), 10 * P + edge, W=6, P=P, generated=0, order=order, dtype=dtype)
    expected = as_integers(scene.cache)
    scene.prune()
    kv = as_integers(scene.kv)
    compact = set(scene.row[scene.N : scene.N + scene.C].tolist())
    slots = list(page_slots(scene))
    assert len(slots) == sum(map(sum, head_lengths(P)))
    for (layer, block, head, slot), (from_layer, from_head, position) in slots:
        assert block in compact
        expected[layer, block, head, slot] = kv[from_layer, from_head, position]
    assert torch.equal(as_integers(scene.cache), expected)


def test_compaction_with_one_layer_left_out_keeps_its_pages_untouched():
    """A layer knows its pages by the table alone, not by what other layers wrote."""
    P = 16
    full = Scene(head_lengths(P), 10 * P, W=6, P=P, generated=0)
    full.prune()
    last = Scene(head_lengths(P), 10 * P, W=6, P=P, generated=0)
    last.positions = full.positions
    before = as_integers(last.cache)
    width = int(last.lengths(2).max())
    selected = torch.full((last.Hkv, width), last.n - last.W)
    for head, positions in enumerate(full.positions[2]):
        selected[head, : len(positions)] = positions
    total = int(last.lengths(2).sum())
    compact_kv(
        last.cache, 2, last.row, selected, total=total, prompt_blocks=last.N, **last.arguments(2)
    )
    changed = (as_integers(last.cache) != before).any(-1).nonzero().tolist()
    mine = [list(slot) for slot, (layer, _, _) in page_slots(full) if layer == 2]
    assert sorted(changed) == sorted(mine)


# The attention


@pytest.mark.parametrize("P", [16, 32])
@pytest.mark.parametrize("G", [1, 4, 7])
@pytest.mark.parametrize(
    ("edge", "W", "generated", "Q"),
    [
        (0, 4, 1, 1),  # the first generated token opens a block behind the compact ones
        (-1, 4, 1, 1),  # it fills the prompt's last block
        (-1, 4, 2, 1),  # the one after it
        (5, 4, 40, 1),  # mid-block, two blocks later
        (5, 4, 40, 3),  # speculation: three queries, each sees one token more
        (-2, 4, 3, 3),  # three queries across the end of the prompt's last block
        (0, 16, 3, 3),  # a window of a block (P=16)
        (1, 33, 70, 70),  # a resumed request: all generated tokens at once, window over blocks
    ],
)
def test_sparse_decode_is_plain_attention_over_what_is_kept(edge, W, generated, Q, G, P):
    scene = Scene(head_lengths(P), 11 * P + edge, W=W, P=P, generated=generated, seed=G)
    scene.prune()
    scene.decode()
    query = torch.randn(Q, scene.Hkv * G, D)
    for layer in range(scene.L):
        torch.testing.assert_close(
            scene.attend(query, layer), scene.expected(query, layer), **TOLERANCE
        )


def test_sparse_decode_within_loose_bounds():
    """The host's bounds may be larger than what the device holds: nothing beyond is read."""
    P = 16
    scene = Scene(head_lengths(P), 11 * P + 3, W=4, P=P, generated=5)
    scene.prune()
    scene.decode()
    query = torch.randn(1, scene.Hkv * 4, D)
    for layer in range(scene.L):
        loose = scene.attend(query, layer, longest=8 * P, max_seq_len=scene.seq_len + 2 * P)
        torch.testing.assert_close(loose, scene.expected(query, layer), **TOLERANCE)


def test_sparse_decode_changes_nothing():
    scene = Scene(head_lengths(16), 11 * 16, W=4, P=16, generated=3)
    scene.prune()
    scene.decode()
    query = torch.randn(3, scene.Hkv, D)
    before = query.clone(), as_integers(scene.cache), scene.row.clone()
    scene.attend(query, 1)
    assert torch.equal(query, before[0])
    assert torch.equal(as_integers(scene.cache), before[1])
    assert torch.equal(scene.row, before[2])


def test_sparse_decode_in_half_precision():
    """Inputs are rounded, the sums are not: the error is that of one rounding of the result."""
    scene = Scene(head_lengths(16), 11 * 16 + 1, W=4, P=16, generated=9, dtype=torch.bfloat16)
    scene.prune()
    scene.decode()
    query = torch.randn(1, scene.Hkv * 4, D).bfloat16()
    out = scene.attend(query, 1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, scene.expected(query, 1), rtol=2**-8, atol=1e-5)


def test_a_rank_sees_its_own_heads_only():
    """The second of two tensor-parallel ranks in the second pipeline stage."""
    P, n, W = 16, 180, 4
    layout = CacheLayout(
        head_lengths(P), window=W, base=1, stages=((0, 1), (1, 3)), tensor_parallel=2
    )
    cache = torch.empty(2, 40, 2, P, 2 * D)
    state = make_state(cache, layout, layout.slice_of(1, 1))
    state.add(INDEX, n)
    assert state.pages.lengths[INDEX].tolist() == [[7 * P + 3, 2], [1, 0]]
    assert state.pages.first_pages[INDEX].tolist() == [[0, 8], [9, 10]]
    assert state.max_kept[INDEX] == 7 * P + 3
    assert state.compact_blocks[INDEX] == 3  # of 4 pages: this rank's 10 are the most


@st.composite
def scenes(draw):
    L, Hkv, P = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 16]))
    W = draw(st.integers(1, 9))
    older = draw(st.integers(1, 60))
    heads = st.tuples(*[st.integers(0, older + 2)] * Hkv)
    lengths = draw(st.tuples(*[heads] * L).filter(lambda rows: any(map(any, rows))))
    generated = draw(st.integers(1, 20))
    Q = draw(st.integers(1, generated))
    order = draw(st.sampled_from(["lbnhc", "lbhnc", "blhnc"]))
    return lengths, older + W, W, P, generated, Q, draw(st.sampled_from([1, 4, 7])), order


@settings(max_examples=60)
@given(scenes())
def test_any_request(drawn):
    lengths, n, W, P, generated, Q, G, order = drawn
    scene = Scene(lengths, n, W, P, generated, order=order)
    before = as_integers(scene.cache)
    scene.prune()
    for (layer, block, head, slot), (from_layer, from_head, position) in page_slots(scene):
        before[layer, block, head, slot] = as_integers(scene.kv)[from_layer, from_head, position]
    assert torch.equal(as_integers(scene.cache), before)
    scene.decode()
    query = torch.randn(Q, scene.Hkv * G, D)
    for layer in range(scene.L):
        torch.testing.assert_close(
            scene.attend(query, layer), scene.expected(query, layer), **TOLERANCE
        )


@pytest.mark.parametrize("P", [16, 32])
@pytest.mark.parametrize("G", [1, 4, 7])
@pytest.mark.parametrize(
    ("seq_len", "Q", "sliding_window"),
    [
        (1, 1, None),  # the first token
        (31, 31, None),  # a whole prompt, a page less one token
        (33, 1, None),  # a decode step, a page and a token
        (70, 20, None),  # a later chunk
        (70, 20, 1),  # a query that sees itself only
        (70, 20, 16),  # a window of a block
        (70, 70, 33),
        (20, 20, 100),  # a window larger than the request
    ],
)
def test_dense_attention(seq_len, Q, sliding_window, G, P):
    torch.manual_seed(3)
    Hkv, blocks = 2, -(-seq_len // P)
    kv = torch.randn(Hkv, seq_len, 2 * D)
    cache = torch.full((blocks + 4, Hkv, P, 2 * D), torch.nan)
    row = torch.cat([1 + torch.randperm(blocks + 3)[:blocks], torch.zeros(3)]).int()
    for token in range(seq_len):
        cache[row[token // P], :, token % P] = kv[:, token]
    query = torch.randn(Q, Hkv * G, D)
    out = dense_attention(query, cache, row, seq_len, D**-0.5, sliding_window)

    at = torch.arange(seq_len)
    seen = at[None] <= at[seq_len - Q :, None]
    if sliding_window is not None:
        seen &= at[None] > at[seq_len - Q :, None] - sliding_window
    key, value = kv.double().repeat_interleave(G, 0).split(D, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double().transpose(0, 1), key, value, attn_mask=seen
    )
    torch.testing.assert_close(out, expected.transpose(0, 1).float(), **TOLERANCE)
