"""What a step does with each request, and where generated tokens go."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE
from vllm.config.compilation import CUDAGraphMode

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine.attention.forward import forward_sparse
from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.engine.worker import warm_up as warm_up_module
from sparsemm_vllm.engine.worker.model_state import DefaultModelState, SparseMMModelState
from sparsemm_vllm.engine.worker.probes.attention import AttentionRecorder
from sparsemm_vllm.engine.worker.state import (
    DECODE_QUERIES,
    Capacity,
    Heads,
    PrunedCache,
    SparseState,
)
from sparsemm_vllm.engine.worker.step import Step, capture_step, plan_step
from sparsemm_vllm.engine.worker.warm_up import warm_up
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import PruneWorkspace, Rows
from sparsemm_vllm.triton_kernels.tables import (
    BATCH_ROW,
    COMPACT_BLOCKS,
    FIRST_QUERY,
    KEPT,
    OFFSET,
    POSITION,
    PROMPT_BLOCKS,
    QUERIES,
    QUERY_END,
    REQUEST,
    TAIL,
    TAIL_START,
    TILE_ROW,
    TOKENS,
)

P, W, BASE = 16, 4, 20
FIRST_PRUNED = W + BASE
# Pages of an empty head, a part of one, one, two, four and as many as the prompt has.
LAYOUT = CacheLayout(((0, 1), (P, P + 1), (50, 5000)), window=W, base=BASE)
MAX_REQUESTS = 8
LONG = DECODE_QUERIES + 1


def make_state(
    prompts=(), G=2, D=16, max_requests=MAX_REQUESTS, max_tokens=1024, drafts=0, max_pages=0
):
    """A rank that runs requests of these prompts, by their indices."""
    own = LAYOUT.slice_of(0, 0)
    state = SparseState(
        LAYOUT,
        own,
        Heads(L=3, Hq=2 * G, Hkv=2, D=D, dtype=torch.bfloat16),
        Capacity(max_requests, max_tokens, 3, decode_queries=1 + drafts, pages=max_pages),
        DEVICE,
    )
    state.attach(PrunedCache(torch.empty(3, 1, 2, P, 2 * D, device=DEVICE), {}))
    for index, n in enumerate(prompts):
        state.add(index, n)
    return state


def plan(state, rows, padded=None):
    """Plan a batch of ``(request, tokens before the step, tokens in it)``."""
    requests, computed, queries = (np.array(column) for column in zip(*rows, strict=True))
    starts = np.concatenate([[0], np.cumsum(queries)])
    return plan_step(state, requests, starts, computed + queries, padded)


def table(step):
    """The prompts to prune, group by group, row by row of `Prompts.table`."""
    return [prompts.table.tolist() for prompts in step.prunes]


def places(step):
    return [row for group in table(step) for row in group[BATCH_ROW]]


def shapes(step):
    return [(batch.first_row, batch.rows, batch.tiles_per_row) for batch in step.decodes]


# Requests


def test_head_pages_follow_one_another():
    """Layer by layer, head by head: no page is left out and none has two owners."""
    state = make_state([23, 100])
    lengths, first = state.pages.lengths[1].flatten(), state.pages.first_pages[1].flatten()
    assert lengths.tolist() == [0, 1, P, P + 1, 50, 96]
    assert first.tolist() == [0, 0, 1, 2, 4, 8]
    assert state.max_kept[1] == 96
    assert state.compact_blocks[1] * lengths.numel() >= 8 + 6


@pytest.mark.parametrize("n", [1, FIRST_PRUNED - 1, FIRST_PRUNED, 95, 96, 97])  # block edges too
def test_host_and_device_know_what_the_layout_says(n):
    state = make_state([5, 5, 5, n])
    blocks = LAYOUT.compact_blocks(n, P)
    assert state.prompt_tokens[3] == state.pages.prompt_tokens[3] == n
    assert state.compact_blocks[3] == state.pages.compact_blocks[3] == blocks
    assert (blocks > 0) == LAYOUT.is_pruned(n)
    assert state.pages.lengths[3].tolist() == LAYOUT.kept_tokens(n).tolist()


@pytest.mark.parametrize(("before", "after"), [(100, 23), (23, 100), (300, 60), (60, 300)])
def test_an_index_that_is_used_again_forgets_its_last_request(before, after):
    state, fresh = make_state(), make_state()
    state.add(5, before, "before")
    for each in (state, fresh):
        each.add(5, after, "after")
    for name in ("prompt_tokens", "compact_blocks", "max_kept", "request_ids"):
        np.testing.assert_array_equal(getattr(state, name), getattr(fresh, name), err_msg=name)
    for name in ("prompt_tokens", "compact_blocks", "lengths", "first_pages"):
        assert torch.equal(getattr(state.pages, name), getattr(fresh.pages, name)), name
    step = plan(state, [(5, after + 1, 1)])
    assert step.moves_slots == LAYOUT.is_pruned(after)


def test_a_rank_knows_its_own_heads():
    """The second of two ranks: its heads' lengths, its own first page."""
    layout = CacheLayout(LAYOUT.capacities, window=W, base=BASE, tensor_parallel=2)
    heads = Heads(3, 2, 1, 16, torch.float32)
    state = SparseState(layout, layout.slice_of(0, 1), heads, Capacity(2, 100, 1), DEVICE)
    state.attach(PrunedCache(torch.empty(3, 1, 1, P, 32), {}))
    state.add(1, 100)
    assert state.pages.lengths[1].tolist() == [[1], [P + 1], [96]]
    assert state.pages.first_pages[1].tolist() == [[0], [1], [3]]
    assert state.max_kept[1] == 96


# Rows


def test_a_mixed_batch_is_sorted():
    n = 100
    state = make_state([n, 23, n, n, n, 24, n, n])
    step = plan(
        state,
        [
            (6, n, 1),  # 0: the first decode step
            (1, 30, 1),  # 1: a decode step of a prompt that is not pruned
            (4, n + 60, 3),  # 2: speculation
            (0, n - W, W),  # 3: a prompt's last chunk, the window alone: prune
            (7, 0, DECODE_QUERIES),  # 4: a first chunk, short
            (2, 40, n - 40),  # 5: a last chunk: prune
            (3, 0, 40),  # 6: a first chunk
            (5, 30, LONG),  # 7: recomputes its answer
            (1, 23, 23),  # 8: the same, not pruned
            (6, n + 1, 1),  # 9: a decode step after the long rows
        ],
    )
    assert step.short_rows == 5
    assert step.pruned_rows == [7, 9]
    assert step.moves_slots
    assert step.max_query_len == 60
    # 16 queries of 2 heads are one tile of 32 rows; 17 pad to 64.
    assert shapes(step) == [(0, 5, 1), (7, 1, 1), (9, 1, 1)]
    (group,) = table(step)
    assert group[BATCH_ROW] == [3, 5]
    assert group[REQUEST] == [0, 2]
    assert group[QUERY_END] == [9, 85]
    assert group[TOKENS] == [n, n]
    assert group[OFFSET] == [0, 112]  # 100 tokens in columns of 16
    assert step.prunes[0].max_tokens == n
    assert step.prunes[0].max_kept == 96


@pytest.mark.parametrize(
    ("computed", "queries", "prunes", "decodes"),
    [
        (0, 40, 0, 0),  # a chunk
        (0, 96, 0, 0),  # a chunk that leaves the window
        (0, 100, 1, 0),  # the whole prompt
        (96, 4, 1, 0),  # the window
        (99 - 40, 40, 0, 0),  # one token left
        (100, 1, 0, 1),  # the first generated token
        (100, DECODE_QUERIES, 0, 1),  # as many as the decode kernel takes
        (100, LONG, 0, 1),
        (100, 60, 0, 1),  # a resumed request recomputes its answer
        (101, 1, 0, 1),
    ],
)
def test_the_life_of_a_pruned_request(computed, queries, prunes, decodes):
    step = plan(make_state([100]), [(0, computed, queries)])
    assert len(places(step)) == prunes
    assert step.moves_slots == bool(decodes)
    short = queries <= DECODE_QUERIES
    assert step.short_rows == int(short)
    assert step.pruned_rows == [0] * (decodes and not short)
    assert len(step.decodes) == (short or decodes)


def test_an_unpruned_request_is_never_pruned_nor_moved():
    for computed, queries in [(0, 23), (19, 4), (23, 1), (23, LONG)]:
        step = plan(make_state([23]), [(0, computed, queries)])
        assert (places(step), step.moves_slots, step.pruned_rows) == ([], False, [])


@pytest.mark.parametrize(("drafts", "longest"), [(0, 16), (15, 16), (16, 17), (40, 41)])
def test_rows_with_all_their_drafts_are_short(drafts, longest):
    state = make_state([100], drafts=drafts)
    assert plan(state, [(0, 100, longest)]).short_rows == 1
    assert plan(state, [(0, 100, longest + 1)]).short_rows == 0


@pytest.mark.parametrize("G", [1, 4, 7])
@pytest.mark.parametrize("D", [16, 256])  # tiles have fewer queries of large heads
@pytest.mark.parametrize("drafts", [0, 40])
def test_the_buffers_hold_every_batch_of_short_rows(G, D, drafts):
    state = make_state(G=G, D=D, drafts=drafts)
    for queries in range(1, state.max_decode_queries + 1):
        batch = state.decode_batch(0, MAX_REQUESTS, queries)
        assert batch.tiles_per_row * batch.block_q >= queries
        assert capture_step(state, MAX_REQUESTS, queries).decodes == [batch]


def test_a_batch_of_decodes_has_nothing_dense():
    state = make_state([100, 101, 102, 103])
    step = plan(state, [(i, 110, 1) for i in (2, 0, 3, 1)])
    assert step.short_rows == 4
    assert shapes(step) == [(0, 4, 1)]
    assert step.decodes[0].buffers is state.buffers


def test_rows_that_pad_a_graph_are_short():
    state = make_state([100, 101, 102])
    step = plan(state, [(i, 110, 2) for i in range(3)], padded=8)
    assert step.short_rows == 8
    assert step.decodes == capture_step(state, 8, 2).decodes, "a graph replays its own shapes"


def test_a_captured_step_only_decodes():
    state = make_state([100])
    step = capture_step(state, 8, 3)
    assert step == Step(state, 8, max_query_len=3, decodes=[state.decode_batch(0, 8, 3)])
    assert step.decodes[0].buffers is state.buffers
    assert not step.moves_slots


def test_long_rows_have_schedules_of_their_own():
    state = make_state([100, 100, 100], G=4)
    first, second, third = plan(state, [(0, 100, 40), (1, 120, 1), (2, 100, 60)]).decodes
    assert [each.query_tiles for each in (first, second, third)] == [3, 1, 4]  # 16 queries each
    every = [state.buffers, first.buffers, second.buffers, third.buffers]
    for name in ("tiles", "items", "first_tile", "first_item"):
        assert len({getattr(buffers, name).data_ptr() for buffers in every}) == 4, name
    for name in ("partial", "stats"):  # used by one launch only
        assert len({getattr(buffers, name).data_ptr() for buffers in every}) == 1, name


def test_a_bound_on_the_length_does_not_make_a_prune_of_a_decode():
    """Async scheduling knows an upper bound only; the device knows the length."""
    state = make_state([100])
    step = plan_step(state, np.array([0]), np.array([0, 4]), np.array([164]))
    assert step.moves_slots
    assert step.prunes == []
    query_start, seq_lens = int32([0, 4]), int32([104])
    slots = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    positions = torch.arange(100, 104, device=DEVICE)
    rows = make_rows(np.random.default_rng(0), 1)
    step.prepare(slots, positions, Rows(rows, query_start, seq_lens, int32([0])))
    scheduled = state.buffers.tiles[0].tolist()
    assert (scheduled[POSITION], scheduled[TAIL]) == (100, 8)


# Prompts that end


def test_prompts_share_the_workspace_as_they_fit():
    state = make_state([100] * 5 + [24] * 3, max_tokens=224)  # of 112 columns two fit exactly
    step = plan(state, [(i, 0, 100) for i in range(5)] + [(i, 0, 24) for i in range(5, 8)])
    groups = table(step)
    assert [group[BATCH_ROW] for group in groups] == [[0, 1], [2, 3], [4, 5, 6, 7]]
    assert [group[OFFSET] for group in groups] == [[0, 112], [0, 112], [0, 112, 144, 176]]
    assert [(p.max_tokens, p.max_kept) for p in step.prunes] == [(100, 96)] * 3


def test_a_group_is_no_larger_than_its_own_prompts():
    state = make_state([24, 100], max_tokens=112)
    step = plan(state, [(0, 0, 24), (1, 0, 100)])
    assert [(p.max_tokens, p.max_kept) for p in step.prunes] == [(24, 20), (100, 96)]


def test_groups_are_no_longer_than_the_statistics():
    count = PruneWorkspace.MAX_PROMPTS + 1
    state = make_state([24] * count, max_requests=count, max_tokens=32 * count)
    step = plan(state, [(i, 0, 24) for i in range(count)])
    assert [prompts.count for prompts in step.prunes] == [count - 1, 1]


@pytest.mark.parametrize("queries", [1, W - 1])
def test_a_last_chunk_without_its_window_is_refused(queries):
    state = make_state([100, 23])
    with pytest.raises(RuntimeError, match=f"100 tokens holds {queries} queries.* window of 4"):
        plan(state, [(0, 100 - queries, queries)])
    plan(state, [(1, 23 - queries, queries)])  # nobody looks at an unpruned prompt's window


# Slots


@pytest.fixture(params=[torch_ops, triton_ops], ids=["torch", "triton"])
def ops(request):
    return request.param


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_rows(rng, rows, width=64):
    """Block tables with distinct blocks, 0 for the null block."""
    blocks = rng.permutation(np.arange(1, 1 + rows * width)).reshape(rows, width)
    return int32(blocks)


def vllm_slots(block_table, rows, padding):
    """vLLM's mapping: entry p // P of the row, whatever the row holds; -1 for padding."""
    slots, positions = [], []
    for i, (_, computed, queries) in enumerate(rows):
        for position in range(computed, computed + queries):
            block = int(block_table[i, position // P])
            slots.append(block * P + position % P)
            positions.append(position)
    slots += [-1] * padding
    positions += [0] * padding
    return torch.tensor(slots, device=DEVICE), torch.tensor(positions, device=DEVICE)


def prepare(state, rows, slots, positions, block_table, padded=0):
    """Plan and prepare; `padded` rows have no queries, nor a length worth reading."""
    step = plan(state, rows, len(rows) + padded if padded else None)
    ends = np.cumsum([queries for *_, queries in rows]).tolist()
    seq_lens = [computed + queries for _, computed, queries in rows]
    given = Rows(
        block_table,
        int32([0, *ends, *ends[-1:] * padded]),
        int32(seq_lens + [0] * padded),
        int32([request for request, *_ in rows]),
    )
    step.prepare(slots, positions, given)
    return step


def test_only_generated_tokens_of_pruned_requests_move(ops):
    prompts = [100, 23, 96, 97, 100, 24]
    state = make_state(prompts)
    state.ops = ops
    rows = [
        (0, 100, 1),  # joins the last prompt block (100 % 16 = 4): stays
        (1, 40, 1),  # not pruned: stays
        (2, 96, 1),  # first token of a growth block: moves
        (3, 97, 40),  # resumed: 15 tokens stay, the others move
        (4, 60, 40),  # prune step: stays
        (5, 60, 3),  # speculation: moves
    ]
    block_table = make_rows(np.random.default_rng(3), len(rows))
    slots, positions = vllm_slots(block_table, rows, padding=5)
    before, tables_before = slots.clone(), block_table.clone()
    prepare(state, rows, slots, positions, block_table)

    token = 0
    for i, (index, computed, queries) in enumerate(rows):
        n = prompts[index]
        decodes = computed >= n and LAYOUT.is_pruned(n)
        C, N = LAYOUT.compact_blocks(n, P), -(-n // P)
        for position in range(computed, computed + queries):
            entry = position // P
            entry += C if decodes and entry >= N else 0
            assert slots[token] == block_table[i, entry] * P + position % P
            token += 1
    moved = (slots != before).nonzero().flatten().tolist()
    assert moved == [2, *range(18, 43), *range(83, 86)]
    assert (slots[token:] == -1).all(), "padding stays padding"
    assert torch.equal(block_table, tables_before)


@pytest.mark.parametrize("n", [95, 96, 97, 100])
def test_a_token_never_lands_in_a_compact_block(ops, n):
    """Over an answer of several blocks, one step after the other."""
    state = make_state([n])
    state.ops = ops
    block_table = make_rows(np.random.default_rng(n), 1)
    N, C = -(-n // P), LAYOUT.compact_blocks(n, P)
    compact = set(block_table[0, N : N + C].tolist())
    seen = set()
    for generated in range(2 * P + 1):
        rows = [(0, n + generated, 1)]
        slots, positions = vllm_slots(block_table, rows, padding=0)
        prepare(state, rows, slots, positions, block_table)
        seen.add(slots.item())
        assert slots.item() // P not in compact
    assert len(seen) == 2 * P + 1, "every token has a slot of its own"


def test_slots_are_corrected_in_place_of_the_tensor_given(ops):
    """Captured graphs read the persistent tensor: a new one would go unseen."""
    state = make_state([96])
    state.ops = ops
    block_table = make_rows(np.random.default_rng(0), 3)
    buffer = torch.full((8,), -1, device=DEVICE)
    rows = [(0, 96, 1)]
    slots, positions = vllm_slots(block_table, rows, padding=0)
    buffer[:1] = slots
    prepare(state, rows, buffer, positions.expand(8).contiguous(), block_table, padded=2)
    assert buffer[0] == block_table[0, 6 + LAYOUT.compact_blocks(96, P)] * P
    assert (buffer[1:] == -1).all()


def test_a_step_that_only_fills_time_moves_nothing(ops):
    """A dummy batch's requests mean nothing: index 0 is that of another, pruned one."""
    state = make_state([24])
    state.ops = ops
    slots = torch.arange(7, device=DEVICE)
    table = make_rows(np.random.default_rng(0), 7)
    rows = Rows(table, int32(range(8)), int32([30] * 7), int32([]))
    capture_step(state, 7, 1).prepare(slots, slots.clone(), rows)
    assert slots.tolist() == list(range(7))
    scheduled = state.buffers.tiles[:7]
    assert (scheduled[:, [TAIL_START, PROMPT_BLOCKS, COMPACT_BLOCKS]] == 0).all()


def test_every_decode_row_is_scheduled(ops):
    n = 100
    state = make_state([n, 23, n, n])
    state.ops = ops
    rows = [(0, n + 3, 2), (1, 40, 1), (3, 0, 40), (2, n, LONG)]
    slots, positions = vllm_slots(make_rows(np.random.default_rng(1), 4), rows, padding=0)
    block_table = make_rows(np.random.default_rng(1), 4)
    step = prepare(state, rows, slots, positions, block_table)
    N, C = 7, LAYOUT.compact_blocks(n, P)
    names = (TILE_ROW, FIRST_QUERY, QUERIES, POSITION, TAIL_START, PROMPT_BLOCKS, COMPACT_BLOCKS)
    expected = [
        [[0, 0, 2, n + 3, n - W, N, C], [1, 2, 1, 40, 0, 0, 0]],
        [[3, 43, LONG, n, n - W, N, C]],
    ]
    for batch, tiles in zip(step.decodes, expected, strict=True):
        assert batch.buffers.tiles[: len(tiles), names].tolist() == tiles
        kept = batch.buffers.items[:, :2, KEPT]
        assert torch.equal(kept, state.pages.lengths[0]), "the first row's request is pruned"


def test_padded_rows_are_scheduled_to_do_nothing(ops):
    state = make_state([100])
    state.ops = ops
    state.buffers.tiles.fill_(99)  # the step before had more rows
    rows = [(0, 100, 1)]
    block_table = make_rows(np.random.default_rng(1), 3)
    slots, positions = vllm_slots(block_table, rows, padding=0)
    prepare(state, rows, slots, positions, block_table, padded=2)
    assert state.buffers.tiles[:3, QUERIES].tolist() == [1, 0, 0]
    assert state.buffers.tiles[:3, TAIL].tolist() == [5, 0, 0]


# Warm-up


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("max_pages", [0, 40])
def test_warm_up_launches_every_serving_kernel_and_changes_nothing(monkeypatch, dtype, max_pages):
    """What vLLM hands over: a null block, tables of zeros."""
    state = make_state(max_pages=max_pages)
    state.ops = triton_ops
    cache = torch.zeros(3, 1, 2, P, 2 * 16, dtype=dtype, device=DEVICE)
    state.attach(PrunedCache(cache, {}))
    launched = set()
    for name in triton_ops.__all__:
        launch = getattr(triton_ops, name)

        def watch(*args, name=name, launch=launch):
            launched.add(name)
            launch(*args)

        monkeypatch.setattr(triton_ops, name, watch)
    block_table = torch.zeros(MAX_REQUESTS, 128, dtype=torch.int32, device=DEVICE)
    warm_up(state, dtype, block_table)
    unused = {"top_keys"} if max_pages else {"top_keys", "list_pages"}  # of profiling, of a variant
    assert launched == set(triton_ops.__all__) - unused
    assert not cache.any()
    assert not block_table.any()
    assert not state.pages.compact_blocks.any()


def test_warm_up_asks_the_compiled_kernels_how_many_fit(monkeypatch):
    """Tiles of 16, 32 and 64 query rows are kernels of their own, with registers of their own."""
    state = make_state(G=4)
    state.ops = SimpleNamespace(**{name: getattr(triton_ops, name) for name in triton_ops.__all__})
    state.attach(
        PrunedCache(torch.zeros(3, 1, 2, P, 2 * 16, dtype=torch.bfloat16, device=DEVICE), {})
    )
    state.ops.sparse_decode = lambda *args: args[4].block_m  # in place of a compiled kernel
    fitting = {16: 2, 32: 1, 64: 100}
    monkeypatch.setattr(warm_up_module, "resident_programs", lambda kernel, _: fitting[kernel])
    warm_up(state, torch.bfloat16, torch.zeros(MAX_REQUESTS, 128, dtype=torch.int32, device=DEVICE))
    programs = {queries: state.decode_batch(0, 2, queries).programs for queries in (1, 4, 8, 16)}
    assert programs == {1: 2, 4: 2, 8: 1, 16: 3}, "no more than there is scratch memory for"
    assert state.long_decode_batch(0, LONG).programs == 3


@pytest.mark.parametrize("kernels", [torch_ops, triton_ops], ids=["torch", "triton"])
def test_listed_pages_lead_to_the_same_tokens(kernels):
    """A prompt is pruned and decoded, with places of head pages listed or computed."""
    n, outputs = 90, []
    C = LAYOUT.compact_blocks(n, P)
    row = 1 + torch.randperm(20, generator=torch.Generator().manual_seed(1))
    table = row.int().to(DEVICE)[None]
    for max_pages in (0, C * 3 * 2 + 1):
        state = make_state(max_pages=max_pages)
        state.ops = kernels
        generator = torch.Generator().manual_seed(2)
        cache = torch.randn(3, 21, 2, P, 32, generator=generator).to(torch.bfloat16).to(DEVICE)
        query = torch.randn(n, 4, 16, generator=generator).to(torch.bfloat16).to(DEVICE)
        state.attach(PrunedCache(cache, {f"layers.{i}": i for i in range(3)}))
        state.add(5, n)
        for computed, queries in ((0, n), (n, 1)):
            step = plan(state, [(5, computed, queries)])
            lens = torch.tensor([computed + queries], dtype=torch.int32, device=DEVICE)
            starts = torch.tensor([0, queries], dtype=torch.int32, device=DEVICE)
            none = torch.zeros(queries, dtype=torch.int64, device=DEVICE)
            request = torch.full((1,), 5, dtype=torch.int32, device=DEVICE)
            step.prepare(none, none, Rows(table, starts, lens, request))
            for layer in range(3):
                output = torch.zeros_like(query[:queries])
                named = SimpleNamespace(layer_name=f"layers.{layer}")
                forward_sparse(step, named, query[:queries], output, table, 0.25)
                outputs.append(output)
    half = len(outputs) // 2
    assert all(map(torch.equal, outputs[:half], outputs[half:]))
    assert all(output.abs().sum() > 0 for output in outputs[3:half]), "decoded"


# The worker's view


def worker(state, **limits):
    """A model state that has only what planning needs."""
    worker = object.__new__(SparseMMModelState)
    worker._state = state
    limits = RequestLimits(W, 2 * (W + BASE), **limits)
    worker._serving = Serving(Settings(), state.layout, limits)
    return worker


def vllm_batch(rows, prompt_lens):
    requests, computed, queries = (np.array(column) for column in zip(*rows, strict=True))
    return SimpleNamespace(
        idx_mapping_np=requests,
        query_start_loc_np=np.concatenate([[0], np.cumsum(queries)]),
        seq_lens_cpu_upper_bound=torch.from_numpy(computed + queries),
        prefill_len_np=np.array(prompt_lens),
        num_scheduled_tokens=queries,
        num_reqs=len(rows),
        num_reqs_after_padding=len(rows) + 2,
    )


def test_a_decode_graph_never_stands_for_a_step_that_prunes():
    model_state = worker(make_state([100]))
    ends = vllm_batch([(0, 100 - W, W)], [100])
    with pytest.raises(RuntimeError, match="decode graph for a step that prunes"):
        model_state._plan(ends, CUDAGraphMode.FULL, for_capture=False)
    assert model_state._plan(ends, CUDAGraphMode.PIECEWISE, for_capture=False).prunes
    decodes = vllm_batch([(0, 100, 1)], [100])
    assert model_state._plan(decodes, CUDAGraphMode.FULL, for_capture=False).short_rows == 3
    assert model_state._plan(decodes, CUDAGraphMode.NONE, for_capture=False).short_rows == 1


def test_batches_that_stand_for_none():
    """Memory profiling has no step; a capture has one that belongs to no request."""
    model_state = worker(make_state([100]))
    dummy = vllm_batch([(0, 0, 1), (1, 0, 1)], [0, 0])
    assert model_state._plan(dummy, CUDAGraphMode.NONE, for_capture=False) is None
    step = model_state._plan(dummy, CUDAGraphMode.FULL, for_capture=True)
    assert step.short_rows == 2
    assert not step.moves_slots


@pytest.mark.parametrize(
    "extra_args",
    [{"sparsemm_budget": 10**6}, {"sparsemm_budget": "x"}, {"sparsemm": [1]}, {"sparsemm_x": 1}],
)
def test_a_worker_takes_the_servers_settings_for_what_cannot_be(monkeypatch, extra_args):
    """The scheduler has replaced them; a worker that believed a client would place other pages."""
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: None)
    model_state = worker(make_state())
    params = SimpleNamespace(extra_args=extra_args, max_tokens=1)
    new = SimpleNamespace(prompt_len=100, sampling_params=params, req_id="a", prompt_token_ids=[1])
    model_state.add_request(3, new)
    assert model_state._state.layouts[3] is LAYOUT


def test_a_recording_that_cannot_be_does_not_end_the_worker(monkeypatch):
    said = []
    monkeypatch.setattr(
        "sparsemm_vllm.engine.worker.model_state.logger.error",
        lambda text, *a: said.append(text % a),
    )
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: None)
    state = make_state()
    state.attention = AttentionRecorder(3, 4, 2, 16, 8, MAX_REQUESTS, DEVICE)
    model_state = worker(state, recorded=8)
    params = SimpleNamespace(extra_args={"sparsemm_record": [0, 9]}, max_tokens=1)
    model_state.add_request(0, SimpleNamespace(prompt_len=5, sampling_params=params, req_id="a"))
    assert said == [
        "SPARSEMM: request a: sparsemm_record [0, 9]: the last 9 queries of 5, from row 0 of 8 on"
    ]
