"""Every method through the layout and the ops that the engine uses: what is kept, and where."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, bits

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.budget.random_scores import random_scores
from sparsemm_vllm.engine.attention.forward import prune, split_layer
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.engine.worker.step import plan_step
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import Prompts
from sparsemm_vllm.triton_kernels.reference import head_page_slots, kept_tokens, window_scores
from support.golden import (
    KEPT_SETS,
    LAYERS,
    PRUNED,
    Case,
    differs_by_ties_only,
    golden_budget,
    lengths_of,
    published_kept,
)
from support.layouts import method_layouts

P = 16
INDEX = 2  # of the request among those that run
PRUNING = [name for name, method in METHODS.items() if method.prunes]


class Rank:
    """One rank that prunes a prompt, all layers of which see the same queries and keys.

    Args:
        layout: of the whole model.
        query: ``[Hq, n, D]`` of the whole model.
        key: ``[Hkv, n, D]``.
        place: pipeline stage and tensor-parallel rank.
        ops: kernels or twins; what the device has, if not given.
        seed: of the request.
    """

    def __init__(self, layout, query, key, place=(0, 0), ops=None, seed=0):
        self.layout, self.own = layout, layout.slice_of(*place)
        layers, heads = self.own
        G, (_, n, D) = len(query) // len(key), query.shape
        query, key = query[heads.start * G : heads.stop * G], key[heads]
        self.L, self.Hkv, self.n = layers.stop - layers.start, len(key), n
        self.N, self.C = -(-n // P), layout.compact_blocks(n, P)
        sizes = Heads(self.L, self.Hkv * G, self.Hkv, D, torch.float32)
        state = SparseState(layout, self.own, sizes, Capacity(4, n, 2), DEVICE)
        state.ops = ops or state.ops
        blocks = 1 + self.N + self.C
        cache = torch.full((self.L, blocks, self.Hkv, P, 2 * D), torch.nan, device=DEVICE)
        self.row = 1 + torch.randperm(blocks - 1)
        position = torch.arange(n)
        slots = self.row[position // P], slice(None), position % P
        for layer in range(self.L):  # values tell the layer, so that no page is taken for another
            values = torch.full_like(key, layers.start + layer)
            cache[layer][slots] = torch.cat([key, values], -1).transpose(0, 1).to(DEVICE)
        state.attach(PrunedCache(cache, {}))
        state.add(INDEX, n, seed=seed)
        self.state, self.before = state, cache.clone()

        step = plan_step(
            state, torch.tensor([INDEX]).numpy(), *torch.tensor([[0, n], [n, n]]).numpy()
        )
        (prompts,) = step.prunes
        table = self.row[None].int().to(DEVICE)
        tokens = query.transpose(0, 1).contiguous().to(DEVICE)
        self.kept = {}
        for layer in range(self.L):
            state.workspace.positions.fill_(2**30)
            prune(state, layer, tokens, table, prompts, D**-0.5, None)
            lengths = state.pages.lengths[INDEX, layer].tolist()
            for head, length in enumerate(lengths):
                positions = state.workspace.positions[head, :length].long().cpu()
                self.kept[layers.start + layer, heads.start + head] = positions

    def check_pages(self):
        """Each head's tokens lie in pages of its own, within the blocks that were counted."""
        pages, expected = self.state.pages, self.before.clone()
        layers, heads = self.own
        used = set()
        for layer in range(self.L):
            for head in range(self.Hkv):
                kept = self.kept[layers.start + layer, heads.start + head]
                first = pages.first_pages[INDEX, layer, head].cpu()
                own = {int(first) + i for i in range(-(-len(kept) // P))}
                assert not own & used, "a page has two owners"
                used |= own
                source = layer, self.row[kept // P], head, kept % P
                order = torch.arange(len(kept))
                to = head_page_slots(expected.cpu(), self.row, first, order, self.N)
                expected[to] = self.before[source]
        assert max(used, default=0) < self.C * self.L * self.Hkv
        assert torch.equal(bits(self.state.cache.tensor), bits(expected)), "and nowhere else"
        assert max(map(len, self.kept.values())) <= self.state.max_kept[INDEX]


def golden_layout(case, name, **options):
    return CacheLayout.from_scores(
        case.head_scores, case.Hkv, case.budget, case.window, 0.1, name,
        pool_kernel=case.pool_kernel, **options,
    )  # fmt: skip


@pytest.mark.parametrize("number", PRUNED)
@pytest.mark.parametrize("name", KEPT_SETS)
def test_golden_kept_sets(name, number):
    """By the kernels where there is a GPU."""
    case = Case(number)
    rank = Rank(golden_layout(case, name), case.q, case.k)
    rank.check_pages()
    scores, window = case.scores(), set(range(case.n - case.window, case.n))
    for layer in range(LAYERS):
        published = published_kept(case, name, layer)
        for head in range(case.Hkv):
            mine = set(rank.kept[layer, head].tolist()) | window
            assert differs_by_ties_only(mine, published[head], scores[head]), (layer, head)


def random_case(layout, n, seed=0, G=2, D=16):
    """Queries and keys of a prompt, as of any other."""
    generator = torch.Generator().manual_seed(seed)
    Hkv = len(layout.capacities[0])
    return (
        torch.randn(Hkv * G, n, D, generator=generator),
        torch.randn(Hkv, n, D, generator=generator),
    )


@settings(max_examples=60)
@given(method_layouts(), st.integers(0, 60), st.integers(0, 2**64 - 1))
def test_any_method_on_any_ranks(layout, more, seed):
    """Ranks together keep what one would keep, and each finds room for it."""
    n = max(layout.window + layout.base, layout.min_prompt_tokens) + more
    query, key = random_case(layout, n)
    alone = dataclasses.replace(layout, stages=(), tensor_parallel=1)
    whole = Rank(alone, query, key, seed=seed)
    whole.check_pages()
    scores = window_scores(query[:, n - layout.window :], key, layout.pool_kernel)
    L, Hkv = len(layout.capacities), len(key)
    parts = {}
    for stage in range(len(layout.stages)):
        for tensor_rank in range(layout.tensor_parallel):
            rank = Rank(layout, query, key, (stage, tensor_rank), seed=seed)
            rank.check_pages()
            parts |= rank.kept
    assert set(parts) == {(layer, head) for layer in range(L) for head in range(Hkv)}
    for layer in range(L):
        lengths = torch.from_numpy(layout.kept_tokens(n)[layer])
        own = scores
        if layout.rules.token_scores:
            own = random_scores(seed, layer, range(Hkv), n - layout.window)
        if layout.rules.split:
            lengths = layout.rules.split(own, layout.base)
        for head, expected in enumerate(kept_tokens(own, lengths)):
            assert torch.equal(whole.kept[layer, head], expected)
            assert torch.equal(parts[layer, head], expected)


@pytest.mark.parametrize("name", ["adakv", "random"])
def test_kernels_keep_what_their_twins_do(name):
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layout = CacheLayout.from_scores(scores, 2, 20, 4, method=name)
    case = random_case(layout, 45)
    kernels, twins = (Rank(layout, *case, ops=ops, seed=5) for ops in (triton_ops, torch_ops))
    kernels.check_pages()
    for head, expected in twins.kept.items():
        assert torch.equal(kernels.kept[head], expected)


def test_the_pure_functions_say_the_same():
    """Of the method and of the layout, for every method."""
    case = Case(2)
    for name in PRUNING:
        rank = Rank(golden_layout(case, name), case.q, case.k)
        budget, scores = golden_budget(case), case.scores()
        for layer in range(LAYERS):
            if name == "random":
                scores = random_scores(0, layer, range(case.Hkv), case.n - case.window)
            lengths = lengths_of(METHODS[name], budget, layer, case.n, scores)
            for head, expected in enumerate(kept_tokens(scores, lengths)):
                assert torch.equal(rank.kept[layer, head], expected), name


def test_prompts_of_a_launch_are_split_one_by_one():
    """Each by its own scores, into its own pages; the layer's share begins where it must."""
    layout = CacheLayout(((9, 9, 9),) * 2, window=4, base=9, method="adakv")
    heads = Heads(2, 3, 3, 8, torch.float32)
    state = SparseState(layout, layout.slice_of(0, 0), heads, Capacity(4, 400, 1), DEVICE)
    state.attach(PrunedCache(torch.empty(2, 1, 3, 4, 16, device=DEVICE), {}))
    lengths = [60, 33, 90]
    for index, n in zip((3, 0, 1), lengths, strict=True):
        state.add(index, n)
    prompts = Prompts.pack([(0, 3, 0, 60), (1, 0, 0, 33), (2, 1, 0, 90)], 9, DEVICE)
    state.workspace.scores.copy_(torch.rand_like(state.workspace.scores) ** 8)
    before = state.pages.lengths.clone()
    split_layer(state, 1, prompts)
    for _, index, _, n, offset in prompts.entries:
        own = state.workspace.scores[:, offset : offset + n - 4]
        split = layout.rules.split(own, 9)
        assert torch.equal(state.pages.lengths[index, 1], split)
        head_pages = -(-split // 4)
        first = layout.layer_pages(n, 4) + head_pages.cumsum(0) - head_pages
        assert torch.equal(state.pages.first_pages[index, 1], first.int())
    state.pages.lengths[:, 1] = before[:, 1]
    assert torch.equal(state.pages.lengths, before), "other layers and requests stay as they are"
