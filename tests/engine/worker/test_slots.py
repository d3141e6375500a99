"""Where generated tokens go, and what decode rows are told of it."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE

from sparsemm_vllm.engine.worker.step import capture_step
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import Rows
from sparsemm_vllm.triton_kernels.tables import (
    COMPACT_BLOCKS,
    FIRST_QUERY,
    KEPT,
    POSITION,
    PROMPT_BLOCKS,
    QUERIES,
    TAIL,
    TAIL_START,
    TILE_ROW,
)
from support.steps import LAYOUT, LONG, P, W, int32, make_rows, make_state, plan


@pytest.fixture(params=[torch_ops, triton_ops], ids=["torch", "triton"])
def ops(request):
    return request.param


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
