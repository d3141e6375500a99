"""Blocks of a pruned request, against a simulation that places every page."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.methods import adakv_split
from sparsemm_vllm.budget.random_scores import random_scores
from sparsemm_vllm.budget.settings import Settings
from support.layouts import BASE, CAPACITIES, W, make_layout, method_layouts


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


def simulate(layout, n, block_size, kept=None):
    """Most blocks that any rank needs, from the definition; one if none keeps anything."""
    L, Hkv = len(layout.capacities), len(layout.capacities[0])
    per_rank = Hkv // layout.tensor_parallel
    needs = [
        place_pages(
            layout.capacities if kept is None else kept,
            range(*stage),
            range(rank * per_rank, (rank + 1) * per_rank),
            n,
            block_size,
        )
        for stage in (layout.stages or ((0, L),))
        for rank in range(layout.tensor_parallel)
    ]
    return max(1, *needs)


# W + base is the first pruned prompt; then page edges of the prompt and of the kept part.
PROMPTS = [10, 11, 15, 16, 17, 19, 20, 21, 31, 32, 33, 36, 37, 64, 100, 164, 165, 1000]


# At and beside the edges of pages, and more than any prompt here has.
one_head = st.one_of(st.integers(0, 200), st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 5000]))
capacity_tables = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4, 8])).flatmap(
    lambda shape: st.tuples(*[st.tuples(*[one_head] * shape[1]) for _ in range(shape[0])])
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


# Methods


ONE_HEAD = CacheLayout(((173,),), window=W, base=173, method="adakv")  # it keeps 172


@given(method_layouts(), st.integers(1, 1500), st.sampled_from([1, 16, 32]))
@example(ONE_HEAD, W + 173, 1)
def test_blocks_of_every_method_as_placed(layout, n, block_size):
    """All ranks' slices are placed; their lengths are those of the whole model."""
    kept = layout.kept_tokens(n)
    blocks = layout.compact_blocks(n, block_size)
    assert (blocks > 0) == layout.is_pruned(n), "this is how the kernels tell them apart"
    if not layout.is_pruned(n):
        assert not kept.any()
        return
    assert 0 <= kept.min() <= kept.max() <= n - W
    for stage, rank in itertools.product(range(len(layout.stages)), range(layout.tensor_parallel)):
        own = layout.slice_of(stage, rank)
        assert kept[own].max() <= layout.most_kept(n, own) <= n - W
    if layout.rules.split is None:
        assert blocks == simulate(layout, n, block_size, kept)
    total = np.minimum(layout.capacities, n - W).sum()
    if layout.rules.split is not None:
        even = layout.rules.split(torch.ones(kept.shape[1], n - W), layout.base)
        assert (kept == even.numpy()).all()
    elif layout.redistribute and layout.method != "pyramidkv":
        assert kept.sum() == min(np.sum(layout.capacities), (n - W) * kept.size)
    elif layout.method != "pyramidkv":
        assert kept.sum() == total


@given(method_layouts(), st.integers(0, 300), st.integers(0, 2**32), st.sampled_from([1, 4, 16]))
def test_any_split_of_a_layer_fits_its_pages(layout, more, seed, block_size):
    """AdaKV's own, and the bound is no looser than rounding."""
    layout = dataclasses.replace(layout, method="adakv", tensor_parallel=1)
    Hkv, older = len(layout.capacities[0]), layout.base + more
    n = max(older + W, layout.min_prompt_tokens)
    older = n - W
    split = adakv_split(random_scores(seed, 0, range(Hkv), older) ** 6, layout.base)
    pages = int((-(-split // block_size)).sum())
    bound = layout.layer_pages(n, block_size)
    assert pages <= bound <= layout.compact_blocks(n, block_size) * Hkv
    assert bound <= Hkv * (-(-older // block_size))
    assert bound <= (Hkv * (layout.base + 0.5) + Hkv * (block_size - 1)) / block_size
    assert split.max() <= layout.most_kept(n, layout.slice_of(0, 0))


@given(method_layouts(), st.integers(1, 800))
def test_a_token_more_in_the_prompt_is_at_most_a_token_more_in_each_head(layout, n):
    """What `most_compact_blocks` counts on."""
    if layout.is_pruned(n):
        assert (layout.kept_tokens(n + 1) - layout.kept_tokens(n)).max() <= 1


@settings(max_examples=40)
@given(method_layouts(), st.integers(1, 700), st.sampled_from([1, 16]))
def test_no_prompt_needs_more_than_the_most(layout, longest, block_size):
    most = layout.most_compact_blocks(longest, block_size)
    needs = [layout.compact_blocks(n, block_size) for n in range(1, longest + 1)]
    assert max(needs) <= most
    # A grid of 64 lengths: each head may have the tokens between two of them more.
    assert most <= max(needs) + -(-(longest // 64) // block_size) + 1
    if layout.rules.shorten is None and not layout.redistribute:
        assert most == needs[-1]


def test_the_most_covers_lengths_between_those_that_are_looked_at():
    layout = CacheLayout(
        ((17,), (3,), (600,)), window=W, base=206, stages=((0, 1), (1, 3)), redistribute=True
    )
    first, last = W + 206, W + 600  # there all is given
    needs = [layout.compact_blocks(n, 1) for n in range(first, last + 1)]
    assert max(needs[:: -(-(last - first) // 64)]) < max(needs)
    assert max(needs) <= layout.most_compact_blocks(1200, 1)


def test_redistribution_can_need_fewer_blocks_for_a_longer_prompt():
    """Or nobody would have to look for the most."""
    layout = CacheLayout(((100, 17, 17, 17),), window=W, base=37, redistribute=True)
    needs = [layout.compact_blocks(n, 1) for n in range(W + 37, 120)]
    assert needs == [37] + [38] * (len(needs) - 1)
    pages = [layout.compact_blocks(n, 16) for n in range(W + 37, 120)]
    assert pages != sorted(pages)
    assert layout.most_compact_blocks(119, 16) >= max(pages)


def test_a_pruned_prompt_has_a_block_even_if_no_head_keeps_anything():
    """Without one its prompt blocks would be freed and attended to all the same."""
    layout = CacheLayout(((0, 0), (0, 0)), window=W, base=BASE)
    assert layout.is_pruned(100)
    assert layout.compact_blocks(100, 16) == 1
    assert layout.most_compact_blocks(100, 16) == 1


@pytest.mark.parametrize("redistributes", [False, True])
@pytest.mark.parametrize("n", [1, W + BASE, 10_000])
def test_full_prunes_nothing(n, redistributes):
    """Nor is anything set aside for it."""
    layout = make_layout(method="full", redistribute=redistributes, largest_budget=40)
    assert not layout.is_pruned(n)
    assert layout.compact_blocks(n, 16) == layout.most_compact_blocks(n, 16) == 0
    assert layout.held_blocks(n, n + 5, 16) == -(-(n + 5) // 16)


def test_a_split_of_heads_on_several_ranks_is_refused():
    with pytest.raises(ValueError, match=r"adakv compares the scores of all heads .* 2 tensor-par"):
        make_layout(method="adakv", tensor_parallel=2)
    make_layout(method="adakv", stages=((0, 1), (1, 4)))


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


def test_from_settings_passes_everything_on():
    scores = torch.tensor([[8.0, 1.0, 1.0, 0.0], [2.0, 2.0, 30.0, 4.0]])
    values = {"budget": 20, "window": 4, "rho": 0.5, "method": "random_heads"}
    more = {"redistribute": True, "pool_kernel": 7, "min_prompt_tokens": 9}
    settings = Settings(**values, **more, max_request_budget=33)
    layout = CacheLayout.from_settings(settings, scores, 2, tensor_parallel=2)
    assert layout == CacheLayout.from_scores(
        scores, 2, **values, **more, largest_budget=33, tensor_parallel=2
    )


def test_equal_layouts_are_interchangeable():
    """They travel to other processes and serve as keys there."""
    layout, same = make_layout(tensor_parallel=2), make_layout(tensor_parallel=2)
    layout.compact_blocks(100, 16)  # whatever it remembers must not show
    copy = pickle.loads(pickle.dumps(layout))
    assert layout == same == copy
    assert len({layout, same, copy}) == 1
    assert copy.compact_blocks(100, 16) == same.compact_blocks(100, 16)
    assert layout != make_layout()
    assert make_layout(method="snapkv") != make_layout() != make_layout(redistribute=True)
    with pytest.raises(AttributeError):
        layout.window = 5


def test_figures_of_the_readme():
    """What the README says of even budgets; that of the published scores is in test_budget."""
    layout = CacheLayout.from_scores(torch.ones(32, 32), 32, budget=256)
    assert layout.held_blocks(3072, 3072, block_size=16) == 16
