"""What a step does with each request, and where generated tokens go."""

import numpy as np
import pytest
import torch

from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.step import PrunedCache, RequestTable, Step, correct_slots, plan_step

P, W, BASE = 16, 4, 20
FIRST_PRUNED = W + BASE
# Pages of an empty head, a part of one, one, two, four and as many as the prompt has.
LAYOUT = CacheLayout(((0, 1), (P, P + 1), (50, 5000)), window=W, base=BASE)
MAX_REQUESTS = 8


@pytest.fixture
def table():
    cache = torch.empty(3, 1, 2, P, 2)
    own = LAYOUT.slice_of(0, 0)
    return RequestTable(PrunedCache(cache, {}, LAYOUT, own), MAX_REQUESTS)


def plan(table, rows):
    """Plan a batch of ``(table index, n, tokens before the step, tokens in it)``."""
    indices, prompts, computed, queries = (np.array(column) for column in zip(*rows, strict=True))
    starts = np.concatenate([[0], np.cumsum(queries)])
    return plan_step(table, indices, prompts, starts, computed + queries)


def places(rows):
    return [row.batch_index for row in rows]


def test_a_mixed_batch_is_sorted(table):
    n = 100
    for index, prompt in enumerate([n, 23, n, n, n, 23, n]):
        table.add(index, prompt)
    step = plan(
        table,
        [
            (6, n, n, 1),  # 0: the first decode step
            (1, 23, 0, 23),  # 1: a prompt that is not pruned
            (2, n, 40, n - 40),  # 2: its last chunk: prune
            (3, n, 0, 40),  # 3: a first chunk
            (4, n, n + 60, 3),  # 4: speculation
            (5, 23, 30, 1),  # 5: a decode step of an unpruned prompt
            (0, n, n - W, W),  # 6: prune with the window alone
        ],
    )
    assert places(step.prunes) == [2, 6]
    assert places(step.decodes) == [0, 4]
    assert step.has_dense
    assert [row.table_index for row in step.prunes + step.decodes] == [2, 0, 6, 4]
    assert [row.query for row in step.decodes] == [slice(0, 1), slice(124, 127)]
    assert [row.query for row in step.prunes] == [slice(24, 84), slice(128, 132)]


@pytest.mark.parametrize("n", [FIRST_PRUNED, 95, 96, 97])  # block edges of the prompt
def test_a_row_says_what_the_layout_says(table, n):
    table.add(3, n)
    (row,) = plan(table, [(3, n, n + 7, 1)]).decodes
    assert row.prompt_tokens == n
    assert row.prompt_blocks == -(-n // P)
    assert row.compact_blocks == LAYOUT.compact_blocks(n, P) > 0
    assert row.max_seq_len == n + 8


@pytest.mark.parametrize(
    ("computed", "queries", "prunes", "decodes"),
    [
        (0, 40, 0, 0),  # a chunk
        (0, 96, 0, 0),  # a chunk that leaves the window
        (0, 100, 1, 0),  # the whole prompt
        (96, 4, 1, 0),  # the window
        (100, 1, 0, 1),  # the first generated token
        (100, 60, 0, 1),  # a resumed request recomputes its answer
        (101, 1, 0, 1),
    ],
)
def test_the_life_of_a_pruned_request(table, computed, queries, prunes, decodes):
    table.add(0, 100)
    step = plan(table, [(0, 100, computed, queries)])
    assert (len(step.prunes), len(step.decodes)) == (prunes, decodes)
    assert step.has_dense == (decodes == 0)


def test_a_batch_of_decodes_has_nothing_dense(table):
    for index in range(4):
        table.add(index, 100 + index)
    step = plan(table, [(i, 100 + i, 110, 1) for i in (2, 0, 3, 1)])
    assert places(step.decodes) == [0, 1, 2, 3]
    assert [row.table_index for row in step.decodes] == [2, 0, 3, 1]
    assert not step.has_dense


def test_a_bound_on_the_length_does_not_make_a_prune_of_a_decode(table):
    """Async scheduling knows an upper bound only; the row stays a decode row."""
    table.add(0, 100)
    step = plan_step(table, np.array([0]), np.array([100]), np.array([0, 1]), np.array([164]))
    assert places(step.decodes) == [0]
    assert step.decodes[0].max_seq_len == 164


@pytest.mark.parametrize(("before", "after"), [(100, 23), (23, 100), (300, 60), (60, 300)])
def test_an_index_that_is_used_again_forgets_its_last_request(table, before, after):
    fresh = RequestTable(table.cache, MAX_REQUESTS)
    table.add(5, before)
    for each in (table, fresh):
        each.add(5, after)
    for name in ("compact_blocks", "longest", "kept", "lengths", "first_pages"):
        np.testing.assert_array_equal(getattr(table, name), getattr(fresh, name), err_msg=name)
    step = plan(table, [(5, after, after + 1, 1)])
    assert bool(step.decodes) == LAYOUT.is_pruned(after)


def test_head_pages_follow_one_another(table):
    """Layer by layer, head by head: no page is left out and none has two owners."""
    table.add(1, 100)
    lengths, first = table.lengths[1].flatten(), table.first_pages[1].flatten()
    assert lengths.tolist() == [0, 1, P, P + 1, 50, 96]
    assert first.tolist() == [0, 0, 1, 2, 4, 8]
    assert table.longest[1].tolist() == [1, P + 1, 96]
    assert table.kept[1].tolist() == [1, 2 * P + 1, 146]
    assert table.compact_blocks[1] * lengths.numel() >= 8 + 6


# Slots


def make_rows(rng, rows, width=64):
    """Block tables with distinct blocks, 0 for the null block."""
    blocks = rng.permutation(np.arange(1, 1 + rows * width)).reshape(rows, width)
    return torch.from_numpy(blocks).int()


def vllm_slots(block_table, rows, padding):
    """vLLM's mapping: entry p // P of the row, whatever the row holds; -1 for padding."""
    slots, positions = [], []
    for i, (_, _, computed, queries) in enumerate(rows):
        for position in range(computed, computed + queries):
            block = int(block_table[i, position // P])
            slots.append(block * P + position % P)
            positions.append(position)
    slots += [-1] * padding
    positions += [0] * padding
    return torch.tensor(slots), torch.tensor(positions)


def test_only_generated_tokens_of_pruned_requests_move(table):
    prompts = {0: 100, 1: 23, 2: 96, 3: 97, 4: 100, 5: 24}
    for index, n in prompts.items():
        table.add(index, n)
    rows = [
        (0, 100, 100, 1),  # joins the last prompt block (100 % 16 = 4): stays
        (1, 23, 40, 1),  # not pruned: stays
        (2, 96, 96, 1),  # first token of a growth block: moves
        (3, 97, 97, 40),  # resumed: 15 tokens stay, the others move
        (4, 100, 60, 40),  # prune step: stays
        (5, 24, 60, 3),  # speculation: moves
    ]
    block_table = make_rows(np.random.default_rng(3), len(rows))
    slots, positions = vllm_slots(block_table, rows, padding=5)
    before, tables_before = slots.clone(), block_table.clone()
    correct_slots(plan(table, rows), slots, positions, block_table)

    token = 0
    for i, (index, n, computed, queries) in enumerate(rows):
        decodes = computed >= n and LAYOUT.is_pruned(n)
        C, N = LAYOUT.compact_blocks(n, P), -(-n // P)
        assert index == i
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
def test_a_token_never_lands_in_a_compact_block(table, n):
    """Over an answer of several blocks, one step after the other."""
    table.add(0, n)
    block_table = make_rows(np.random.default_rng(n), 1)
    N, C = -(-n // P), LAYOUT.compact_blocks(n, P)
    compact = set(block_table[0, N : N + C].tolist())
    seen = set()
    for generated in range(3 * P):
        rows = [(0, n, n + generated, 1)]
        slots, positions = vllm_slots(block_table, rows, padding=0)
        correct_slots(plan(table, rows), slots, positions, block_table)
        seen.add(slots.item())
        assert slots.item() // P not in compact
    assert len(seen) == 3 * P, "every token has a slot of its own"


def test_slots_are_corrected_in_place_of_the_tensor_given(table):
    """Captured graphs read the persistent tensor: a new one would go unseen."""
    table.add(0, 96)
    block_table = make_rows(np.random.default_rng(0), 1)
    buffer = torch.full((8,), -1)
    rows = [(0, 96, 96, 1)]
    slots, positions = vllm_slots(block_table, rows, padding=0)
    buffer[:1] = slots
    correct_slots(plan(table, rows), buffer[:1], positions, block_table)
    assert buffer[0] == block_table[0, 6 + LAYOUT.compact_blocks(96, P)] * P
    assert (buffer[1:] == -1).all()


def test_a_step_without_decodes_moves_nothing(table):
    slots = torch.arange(7)
    correct_slots(Step(table), slots, slots.clone(), make_rows(np.random.default_rng(0), 1))
    assert slots.tolist() == list(range(7))
