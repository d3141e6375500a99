"""The torch twins against plain loops in float64, on a striped cache poisoned with NaN.

Every kernel is compared with these functions, so nothing here shares code with them: keys, values
and the order of head pages are kept in ordinary arrays beside the cache.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.triton_kernels.reference import (
    compact_kv,
    dense_attention,
    kept_tokens,
    read_tokens,
    select_tokens,
    sparse_decode,
    window_scores,
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 inside, compared with float64
D = 8
INDEX = 2  # of the request: not the first


def head_lengths(P):
    """Every edge of a page, an empty head first, in the middle and last, and a long one."""
    return (
        (0, 1, P - 1, P),
        (P + 1, 0, 7 * P + 3, 2),
        (2 * P, 3, 1, 0),
    )


def make_state(cache, layout, own):
    """A rank with room for four requests."""
    L, _, Hkv, *_ = cache.shape
    heads = Heads(L, Hkv, Hkv, D, cache.dtype)
    state = SparseState(layout, own, heads, Capacity(4, 1, 1), torch.device("cpu"))
    state.attach(PrunedCache(cache, {}))
    return state


class Scene:
    """A request with a pruned prompt: its tokens in plain tensors, and a cache that holds them.

    `kv` `[L, Hkv, T, 2 * D]` is what the cache should hold; block 0 is vLLM's null block.
    """

    def __init__(self, lengths, n, W, P, generated, seed=0, order="lbnhc", dtype=torch.float32):
        torch.manual_seed(seed)
        self.n, self.W, self.P, self.seq_len = n, W, P, n + generated
        self.layout = CacheLayout(lengths, window=W, base=1)
        assert self.layout.is_pruned(n)
        L, Hkv = len(lengths), len(lengths[0])
        self.L, self.Hkv = L, Hkv
        self.N, self.C = -(-n // P), self.layout.compact_blocks(n, P)
        used = -(-self.seq_len // P) + self.C
        B = used + 5
        shape = {"L": L, "B": B, "H": Hkv, "N": P, "C": 2 * D}
        physical = torch.empty([shape[a] for a in order.upper()], dtype=dtype)
        physical.fill_(torch.nan)
        self.cache = physical.permute(*[order.upper().index(a) for a in "LBHNC"])
        ids = 1 + torch.randperm(B - 1)
        self.row = torch.cat([ids[:used], torch.zeros(6, dtype=torch.long)]).int()
        self.kv = torch.randn(L, Hkv, self.seq_len, 2 * D).to(dtype)
        self.state = make_state(self.cache, self.layout, self.layout.slice_of(0, 0))
        for index in range(4):  # neighbours and an earlier owner of the index must not matter
            self.state.add(index, 4 * n)
        self.state.add(INDEX, n)
        self.positions = []  # kept positions by layer and head
        for token in range(n):
            self.write(token, entry=token // P)

    def write(self, token, entry):
        self.cache[:, self.row[entry], :, token % self.P] = self.kv[:, :, token]

    def arguments(self, layer):
        return {"lengths": self.lengths(layer), "first_pages": self.first(layer)}

    def lengths(self, layer):
        return self.state.pages.lengths[INDEX, layer]

    def first(self, layer):
        return self.state.pages.first_pages[INDEX, layer]

    def prune(self):
        """Select at random, compact layer by layer, hand the freed blocks to others."""
        for layer in range(self.L):
            scores = torch.rand(self.Hkv, self.n - self.W)
            capacities = torch.tensor(self.layout.capacities[layer])
            width = int(self.lengths(layer).max())
            selected = select_tokens(scores, capacities, width)
            compact_kv(
                self.cache,
                layer,
                self.row,
                selected,
                total=int(self.lengths(layer).sum()),
                prompt_blocks=self.N,
                **self.arguments(layer),
            )
            lengths = capacities.clamp(max=self.n - self.W).tolist()
            self.positions.append([selected[h, :length] for h, length in enumerate(lengths)])

    def decode(self):
        """Blocks of older prompt tokens are gone; generated tokens lie behind the compact ones."""
        self.cache[:, self.row[: (self.n - self.W) // self.P].long()] = torch.nan
        for token in range(self.n, self.seq_len):
            entry = token // self.P
            self.write(token, entry if entry < self.N else entry + self.C)

    def attend(self, query, layer, **bounds):
        options = {
            "longest": int(self.lengths(layer).max()),
            "max_seq_len": self.seq_len,
        } | bounds
        return sparse_decode(
            query,
            self.cache,
            layer,
            self.row,
            tail_start=self.n - self.W,
            prompt_blocks=self.N,
            compact_blocks=self.C,
            seq_len=torch.tensor(self.seq_len),
            scale=D**-0.5,
            **options,
            **self.arguments(layer),
        )

    def expected(self, query, layer):
        """Plain softmax over the kept tokens and the tail, per query and head."""
        Q, Hq, _ = query.shape
        out = torch.empty(Q, Hq, D, dtype=torch.float64)
        for i, hq in itertools.product(range(Q), range(Hq)):
            head = hq // (Hq // self.Hkv)
            tail = torch.arange(self.n - self.W, self.seq_len - Q + i + 1)
            seen = torch.cat([self.positions[layer][head], tail])
            out[i, hq] = plain_attention(query[i, hq], self.kv[layer, head, seen])
        return out.to(query.dtype)


def plain_attention(query, kv):
    key, value = kv.double().split(D, -1)
    return (key @ query.double() / math.sqrt(D)).softmax(0) @ value


def page_slots(scene):
    """Layer, block, head slot and token slot of every kept token, by counting pages."""
    pages = (
        (block, layer, slot)
        for block in scene.row[scene.N : scene.N + scene.C].tolist()
        for layer in range(scene.L)
        for slot in range(scene.Hkv)
    )
    for layer, heads in enumerate(scene.positions):
        for head, positions in enumerate(heads):
            for rank, position in enumerate(positions.tolist()):
                if rank % scene.P == 0:
                    page_block, page_layer, page_head = next(pages)
                yield (page_layer, page_block, page_head, rank % scene.P), (layer, head, position)


def as_integers(tensor):
    """Bytes, so that NaN equals itself."""
    tensor = tensor.contiguous()
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).clone()


# window_scores


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
