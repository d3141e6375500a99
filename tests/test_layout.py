"""Blocks of a pruned request, against a simulation that places every page."""

import itertools
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparsemm_vllm.layout import CacheLayout

W, BASE = 4, 6
# Per layer and head; with pages of 16: none, one token, a page less one, a page, a page and one,
# several, and more than any prompt here has.
CAPACITIES = (
    (0, 1, 15, 16),
    (17, 0, 33, 160),
    (1, 5000, 3, 2),
    (48, 47, 49, 0),
)


def make_layout(**options):
    return CacheLayout(CAPACITIES, window=W, base=BASE, **options)


def place_pages(capacities, layers, heads, n, block_size):
    """Blocks that one rank needs: put its pages into blocks one after the other, counting."""
    slots = ((b, layer, h) for b in itertools.count() for layer in layers for h in heads)
    blocks = set()
    for layer, head in itertools.product(layers, heads):
        kept = 0
        while kept < min(capacities[layer][head], n - W):
            block, _, _ = next(slots)
            blocks.add(block)
            kept += block_size
    return len(blocks)


def simulate(layout, n, block_size):
    """Most blocks that any rank needs, from the definition."""
    L, Hkv = len(layout.capacities), len(layout.capacities[0])
    per_rank = Hkv // layout.tensor_parallel
    return max(
        place_pages(
            layout.capacities,
            range(*stage),
            range(rank * per_rank, (rank + 1) * per_rank),
            n,
            block_size,
        )
        for stage in (layout.stages or ((0, L),))
        for rank in range(layout.tensor_parallel)
    )


SPREADS = [
    {},
    {"tensor_parallel": 2},
    {"tensor_parallel": 4},
    {"stages": ((0, 2), (2, 4))},
    {"stages": ((0, 1), (1, 4))},  # as when layers do not divide evenly
    {"stages": ((0, 3), (3, 4)), "tensor_parallel": 2},
]
# W + base is the first pruned prompt; then page edges of the prompt and of the kept part.
PROMPTS = [10, 11, 15, 16, 17, 19, 20, 21, 31, 32, 33, 36, 37, 64, 100, 164, 165, 1000]


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("n", PROMPTS)
def test_compact_blocks_as_placed(n, spread, block_size):
    layout = make_layout(**spread)
    assert layout.is_pruned(n)
    assert layout.compact_blocks(n, block_size) == simulate(layout, n, block_size)


capacity_tables = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4, 8])).flatmap(
    lambda shape: st.tuples(
        *[st.tuples(*[st.integers(0, 200)] * shape[1]) for _ in range(shape[0])]
    )
)


@given(
    capacity_tables,
    st.integers(1, 300),
    st.integers(0, 100),
    st.sampled_from([1, 16, 32]),
    st.data(),
)
def test_any_spread_over_ranks(capacities, n, base, block_size, data):
    L, Hkv = len(capacities), len(capacities[0])
    cut = data.draw(st.integers(0, L - 1))
    stages = ((0, cut), (cut, L)) if cut else ((0, L),)
    ranks = data.draw(st.sampled_from([r for r in (1, 2, 4, 8) if Hkv % r == 0]))
    layout = CacheLayout(capacities, window=W, base=base, stages=stages, tensor_parallel=ranks)
    blocks = layout.compact_blocks(n, block_size)
    kept = layout.kept_tokens(n)
    assert kept.shape == (L, Hkv)
    if not layout.is_pruned(n):
        assert blocks == layout.freed_blocks(n, block_size) == 0
        assert not kept.any()
        return
    assert blocks == simulate(layout, n, block_size)
    owned = torch.zeros(L, Hkv, dtype=torch.int)
    for stage, rank in itertools.product(range(len(stages)), range(ranks)):
        own = layout.slice_of(stage, rank)
        owned[own] += 1
        pages = -(-kept[own] // block_size)
        assert pages.sum() <= blocks * pages.size, "a rank's pages must fit into the C blocks"
    assert (owned == 1).all(), "every head of every layer has one owner"


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("n", PROMPTS)
def test_freed_blocks_as_placed(n, block_size):
    """A prompt block goes when none of its tokens is in the window; the last one is never gone."""
    layout = make_layout()
    blocks = [range(b, min(b + block_size, n)) for b in range(0, n, block_size)]
    gone = [block for block in blocks if all(token < n - W for token in block)]
    if len(gone) == len(blocks):  # cannot be: the window is not empty
        pytest.fail("the last prompt block was freed")
    full = [block for block in gone if len(block) == block_size]
    assert layout.freed_blocks(n, block_size) == len(full) == len(gone)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("n", PROMPTS)
def test_held_blocks_as_placed(n, block_size):
    layout = make_layout()
    for generated in (0, 1, block_size - 1, block_size, block_size + 1, 5 * block_size):
        tokens = n + generated
        row = {token // block_size for token in range(tokens)}
        gone = set(range((n - W) // block_size))
        expected = len(row - gone) + simulate(layout, n, block_size)
        assert layout.held_blocks(n, tokens, block_size) == expected


@pytest.mark.parametrize("n", [1, W, W + BASE - 1])
def test_a_dense_prompt_holds_its_own_blocks(n):
    layout = make_layout()
    assert layout.compact_blocks(n, 16) == 0
    assert layout.held_blocks(n, n + 40, 16) == -(-(n + 40) // 16)


@given(capacity_tables, st.integers(0, 60), st.sampled_from([1, 16]))
@example(CAPACITIES, BASE, 16)
def test_longer_prompts_never_need_fewer_blocks(capacities, base, block_size):
    """Admission control counts on it: the longest request bounds all others."""
    layout = CacheLayout(capacities, window=W, base=base, min_prompt_tokens=20)
    needs = [layout.compact_blocks(n, block_size) for n in range(1, 300)]
    assert needs == sorted(needs)
    pruned = [layout.is_pruned(n) for n in range(1, 300)]
    assert pruned == sorted(pruned)


@pytest.mark.parametrize(
    ("n", "pruned"),
    [
        (0, False),  # no prompt at all
        (W, False),  # the window only
        (W + BASE - 1, False),  # base > n - W: as published, keep everything
        (W + BASE, True),  # base == n - W
        (W + BASE + 1, True),
    ],
)
def test_the_first_pruned_prompt(n, pruned):
    assert make_layout().is_pruned(n) is pruned


@pytest.mark.parametrize(("n", "pruned"), [(19, False), (20, True), (21, True)])
def test_short_prompts_are_left_dense_on_request(n, pruned):
    layout = make_layout(min_prompt_tokens=20)
    assert layout.is_pruned(n) is pruned
    assert bool(layout.kept_tokens(n).any()) is pruned


def test_no_head_keeps_more_than_there_is():
    kept = make_layout().kept_tokens(37)
    assert kept.max() == 33
    assert kept.tolist()[2] == [1, 33, 3, 2]


def test_heads_that_do_not_divide_are_refused():
    for ranks in (3, 8):
        with pytest.raises(ValueError, match=f"4 KV heads cannot be divided among {ranks}"):
            make_layout(tensor_parallel=ranks)


def test_a_stage_without_a_pruned_layer_is_refused():
    with pytest.raises(ValueError, match="stage 1 has no layer"):
        make_layout(stages=((0, 4), (4, 4)))


def test_from_scores_passes_everything_on():
    scores = torch.tensor([[8.0, 1.0, 1.0, 0.0], [2.0, 2.0, 30.0, 4.0]])
    layout = CacheLayout.from_scores(
        scores, 2, 20, 4, 0.5, pool_kernel=7, min_prompt_tokens=9, tensor_parallel=2
    )
    assert (layout.window, layout.base, layout.pool_kernel) == (4, 16, 7)
    assert (layout.min_prompt_tokens, layout.tensor_parallel, layout.stages) == (9, 2, ((0, 2),))
    # floor 8, the other 8 * 4 tokens by 9 : 1 : 4 : 34 of 48
    assert layout.capacities == ((14, 9), (11, 31))


def test_equal_layouts_are_interchangeable():
    """They travel to other processes and serve as keys there."""
    layout, same = make_layout(tensor_parallel=2), make_layout(tensor_parallel=2)
    layout.compact_blocks(100, 16)  # whatever it remembers must not show
    copy = pickle.loads(pickle.dumps(layout))
    assert layout == same == copy
    assert len({layout, same, copy}) == 1
    assert copy.compact_blocks(100, 16) == same.compact_blocks(100, 16)
    assert layout != make_layout()
    with pytest.raises(AttributeError):
        layout.window = 5


def test_figures_of_the_readme():
    """What the README says of even budgets; that of the published scores is in test_budget."""
    layout = CacheLayout.from_scores(torch.ones(32, 32), 32, budget=256)
    assert layout.held_blocks(3072, 3072, block_size=16) == 16
