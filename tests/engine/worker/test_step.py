"""What a step does with each request."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.worker.state import (
    DECODE_QUERIES,
    Capacity,
    Heads,
    PrunedCache,
    SparseState,
)
from sparsemm_vllm.engine.worker.step import Step, capture_step, plan_step
from sparsemm_vllm.triton_kernels.batch import PruneWorkspace, Rows
from sparsemm_vllm.triton_kernels.tables import (
    BATCH_ROW,
    OFFSET,
    POSITION,
    QUERY_END,
    REQUEST,
    TAIL,
    TOKENS,
)
from support.steps import (
    BASE,
    FIRST_PRUNED,
    LAYOUT,
    LONG,
    MAX_REQUESTS,
    P,
    W,
    int32,
    make_rows,
    make_state,
    plan,
)


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
