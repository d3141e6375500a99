from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Rows
from sparsemm_vllm.triton_kernels.correct_slots import BLOCK, correct_slots

P = 16
MAX_BLOCKS = 60


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Step:
    """Rows ``(n, C, tokens before the step, tokens in it)``, as vLLM maps them.

    Row `i` has index ``7 * i % 32`` of the pages; the indices between hold other pruned requests.
    """

    def __init__(self, rows, padding=5, padded_rows=2, page_size=P, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.page_size = rows, page_size
        R = len(rows)
        wide = torch.randint(1, 2**30, (R + padded_rows, 2 * MAX_BLOCKS), generator=generator)
        self.table = wide.int().to(DEVICE)[:, :MAX_BLOCKS]
        self.requests = torch.tensor([7 * i % 32 for i in range(R)], device=DEVICE)
        pages = HeadPages.empty(32, 1, 1, DEVICE)
        pages.prompt_tokens.fill_(1)
        pages.compact_blocks.fill_(3)
        pages.prompt_tokens[self.requests] = int32([row[0] for row in rows])
        pages.compact_blocks[self.requests] = int32([row[1] for row in rows])
        self.pages = pages
        starts, positions, slots = [0], [], []
        for i, (_, _, computed, queries) in enumerate(rows):
            own = torch.arange(computed, computed + queries)
            positions.append(own)
            block = self.table[i].cpu().long()[own // page_size]
            slots.append(block * page_size + own % page_size)
            starts.append(starts[-1] + queries)
        # Padded rows of a captured graph: no tokens, a length that says nothing.
        starts += [starts[-1]] * padded_rows
        self.query_start = int32(starts)
        self.seq_lens = int32([row[2] + row[3] for row in rows] + [10**6] * padded_rows)
        self.positions = torch.cat([*positions, torch.zeros(padding, dtype=torch.int64)]).to(DEVICE)
        self.slots = torch.cat([*slots, torch.full((padding,), -1)]).to(DEVICE)
        self.max_query_len = max(row[3] for row in rows)

    def run(self, op, **changes):
        rows = Rows(self.table, self.query_start, self.seq_lens, self.requests)
        of_rows = {field.name for field in fields(Rows)} & changes.keys()
        args = {
            "slots": self.slots.clone(),
            "positions": self.positions,
            "rows": replace(rows, **{name: changes.pop(name) for name in of_rows}),
            "pages": self.pages,
            "page_size": self.page_size,
            "max_query_len": self.max_query_len,
        } | changes
        op(**args)
        return args["slots"]

    def expected(self):
        """Token by token, in Python."""
        slots, size, token = self.slots.tolist(), self.page_size, 0
        table = self.table.tolist()
        for i, (n, C, computed, queries) in enumerate(self.rows):
            for position in range(computed, computed + queries):
                if C and computed >= n:
                    entry = position // size
                    entry += C if entry >= -(-n // size) else 0
                    slots[token] = table[i][entry] * size + position % size
                token += 1
        return slots

    def check(self):
        expected = self.expected()
        assert self.run(correct_slots).tolist() == expected
        assert self.run(torch_ops.correct_slots).tolist() == expected
        return expected


def test_only_generated_tokens_of_pruned_requests_move():
    step = Step(
        [
            (100, 2, 100, 1),  # joins the last prompt block (100 % 16 = 4): stays
            (23, 0, 40, 1),  # not pruned: stays
            (96, 2, 96, 1),  # first token of a growth block: moves
            (97, 3, 97, 40),  # resumed: 15 tokens stay, the others move
            (100, 2, 60, 40),  # prune step: stays
            (100, 2, 99, 40),  # one prompt token left: stays
            (24, 1, 60, 3),  # speculation: moves
        ]
    )
    expected = step.check()
    moved = [i for i, slot in enumerate(step.slots.tolist()) if slot != expected[i]]
    assert moved == [2, *range(18, 43), *range(123, 126)]
    assert expected[-5:] == [-1] * 5


@pytest.mark.parametrize("n", [95, 96, 97])  # next to and at the end of a block
def test_blocks_of_an_answer(n):
    for generated in range(0, 3 * P, 5):
        Step([(n, 2, n + generated, 1)], padded_rows=0, padding=0).check()


@pytest.mark.parametrize("queries", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])  # edges of a program
def test_many_queries(queries):
    Step([(33, 4, 40, queries), (33, 4, 33, 1), (50, 1, 50, queries)]).check()


@pytest.mark.parametrize("page_size", [8, 128])
def test_page_sizes(page_size):
    Step([(100, 3, 100, 200), (128, 3, 128, 2)], page_size=page_size).check()


def test_a_longer_bound_and_narrow_indices_change_nothing():
    step = Step([(40, 2, 44, 3), (64, 1, 64, 1)])
    expected = step.expected()
    assert step.run(correct_slots, max_query_len=1000).tolist() == expected
    assert step.run(correct_slots, requests=step.requests.int()).tolist() == expected


def test_slots_of_other_rows_are_not_even_recomputed():
    step = Step([(40, 0, 44, 3), (64, 1, 64, 1), (64, 1, 10, 5)])
    step.slots.fill_(-1)
    expected = [-1] * len(step.slots)
    expected[3] = int(step.table[1, 5]) * P
    assert step.run(correct_slots).tolist() == expected


def test_slots_beyond_32_bits():
    step = Step([(40, 2, 48, 3)])
    step.table.fill_(2**31 - 1)
    assert step.run(correct_slots)[:3].tolist() == [(2**31 - 1) * P + i for i in range(3)]


@settings(max_examples=30)
@given(data=st.data())
def test_any_step(data):
    rows = []
    for _ in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(1, 120))
        computed = data.draw(st.integers(max(0, n - 2), n + 100))
        rows.append((n, data.draw(st.integers(0, 4)), computed, data.draw(st.integers(0, 40))))
    Step(rows, data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))).check()


def test_contract():
    step = Step([(40, 2, 44, 3), (64, 1, 64, 1)], padded_rows=0)
    with pytest.raises(ValueError, match=r"slots is torch.int32 \[9\].* of torch.int64 wanted"):
        step.run(correct_slots, slots=step.slots.int())
    with pytest.raises(ValueError, match=r"positions is .*stride \(2,\); a contiguous vector"):
        step.run(correct_slots, positions=step.positions.repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match="query_start has 2 elements; 3 wanted at least"):
        step.run(correct_slots, query_start=step.query_start[:2])
    with pytest.raises(ValueError, match="seq_lens has 1 elements; 2 wanted at least"):
        step.run(correct_slots, seq_lens=step.seq_lens[:1])
    with pytest.raises(ValueError, match=r"of torch.int32 or torch.int64 wanted"):
        step.run(correct_slots, requests=step.requests.short())
    with pytest.raises(ValueError, match=r"block_table is torch.int64"):
        step.run(correct_slots, block_table=step.table.long())
