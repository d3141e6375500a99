"""The schedule against its torch twin, and what makes it a good one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, head_pages

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Rows
from sparsemm_vllm.triton_kernels.decode_batch import SETUP_TILES, DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.schedule_decode import schedule_decode
from sparsemm_vllm.triton_kernels.tables import (
    COMPACT_BLOCKS,
    KEPT,
    PROMPT_BLOCKS,
    QUERIES,
    TAIL,
    TAIL_START,
)
from sparsemm_vllm.triton_kernels.tile_sizes import DecodeOptions

P, W, BLOCK_N = 8, 4, 16
HALF = torch.bfloat16
OPTIONS = DecodeOptions(BLOCK_N, stages=2, num_warps=4)
WRITTEN = ("tiles", "items", "first_tile", "first_item", "arrived")


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


NO_BLOCKS = int32([]).view(0, 0)  # a schedule does not read the block table


def requests(L: int = 2, Hkv: int = 3) -> HeadPages:
    """A pruned request, one that is not, and one whose heads keep 0, 1, P - 1, P and P + 1."""
    generator = torch.Generator().manual_seed(L * Hkv)
    long = torch.randint(0, 57, (L, Hkv), generator=generator)
    long[0, 0] = 57  # all that a prompt of 61 has besides the window
    edges = torch.tensor([0, 1, P - 1, P, P + 1]).repeat(L * Hkv)[: L * Hkv].reshape(L, Hkv)
    lengths = torch.stack([long, torch.zeros_like(long), edges])
    return head_pages([61, 9, 37], lengths, [3, 0, 2], P)


def schedule(
    op: object,
    pages: HeadPages,
    query_lens: list[int],
    seq_lens: list[int],
    request: list[int],
    programs: int = 5,
    G: int = 2,
    first_row: int = 0,
    rows: int | None = None,
) -> DecodeBatch:
    L, Hkv = pages.lengths.shape[1:]
    rows = len(query_lens) - first_row if rows is None else rows
    buffers = DecodeBuffers.allocate(32, L, Hkv, 16, HALF, programs + 2, DEVICE)
    for name in WRITTEN:
        getattr(buffers, name).fill_(-7)  # whoever reads what was not written fails
    longest = max(query_lens[first_row : first_row + rows])
    batch = DecodeBatch.of(buffers, first_row, rows, longest, G, programs, OPTIONS)
    starts = int32([0, *torch.tensor(query_lens).cumsum(0).tolist()])
    given = Rows(NO_BLOCKS, starts, int32(seq_lens), torch.tensor(request, device=DEVICE))
    op(batch, pages, W, P, given)
    return batch


def both(*args: object, **options: object) -> DecodeBatch:
    """Schedules by the kernel and by the twin; equal, what is not to be written included."""
    kernel, twin = (
        schedule(op, *args, **options) for op in (schedule_decode, torch_ops.schedule_decode)
    )
    for name in WRITTEN:
        torch.testing.assert_close(getattr(kernel.buffers, name), getattr(twin.buffers, name))
    return kernel


@pytest.mark.parametrize("programs", [1, 5, 64])  # fewer, about as many and more than tiles
def test_a_mixed_batch(programs: int) -> None:
    """Decodes, draft tokens, a short prompt that is being computed, two padded rows."""
    batch = both(
        requests(), [1, 3, 1, 9, 0, 0], [61 + 7, 9 + 5, 37 + 1, 9, 0, 0], [0, 1, 2, 1], programs
    )
    rows = batch.buffers.tiles[: batch.query_tiles].cpu()
    assert rows[:, QUERIES].tolist() == [1, 3, 1, 9, 0, 0]
    assert rows[:, TAIL_START].tolist() == [57, 0, 33, 0, 0, 0]
    assert rows[:, PROMPT_BLOCKS].tolist() == [8, 0, 5, 0, 0, 0]
    assert rows[:, COMPACT_BLOCKS].tolist() == [3, 0, 2, 0, 0, 0]
    assert rows[:, TAIL].tolist() == [W + 7, 14, W + 1, 9, 0, 0]


@pytest.mark.parametrize(
    ("computed", "pruned"),
    [(59, False), (60, False), (61, True), (62, True)],  # one-token chunks: the prompt has 61
)
def test_a_prompt_is_dense_until_it_is_computed(computed: int, pruned: bool) -> None:
    """vLLM may run a one-token chunk of a prompt as a decode."""
    batch = both(requests(), [1], [computed + 1], [0])
    assert bool(batch.buffers.tiles[0, COMPACT_BLOCKS]) == pruned
    assert batch.buffers.tiles[0, TAIL].item() == (computed + 1 - 57 if pruned else computed + 1)
    assert bool(batch.buffers.items[0, 0, KEPT]) == pruned


@pytest.mark.parametrize("query_len", [1, 2, 16, 17, 40])  # one tile of 16 rows, several of 64
@pytest.mark.parametrize("G", [1, 4, 7])
def test_long_queries_are_cut_into_tiles(query_len: int, G: int) -> None:
    batch = both(requests(), [query_len, 1], [61 + query_len, 40], [0, 2], G=G)
    rows = batch.buffers.tiles[: batch.tiles_per_row].cpu()
    assert rows[:, QUERIES].sum() == query_len
    last = rows[(query_len - 1) // batch.block_q]
    assert last[TAIL] == W + query_len, "the last tile sees the whole tail"
    assert (rows[:, QUERIES] * G <= 64).all()


def test_rows_in_the_middle_of_a_batch() -> None:
    """A resumed request between prefilled rows has a schedule of its own."""
    both(requests(), [1, 30, 20, 50], [62, 30, 37 + 40, 50], [0, 1, 2, 0], first_row=2, rows=1)


def test_dummy_batches_belong_to_no_request() -> None:
    """Captured graphs are recorded with them: all rows are dense."""
    batch = both(requests(), [1, 1, 1], [1, 1, 1], [])
    assert (batch.buffers.tiles[:3, COMPACT_BLOCKS] == 0).all()
    assert (batch.buffers.tiles[:3, TAIL] == 1).all()


def test_an_idle_batch_reads_nothing() -> None:
    batch = both(requests(), [0, 0], [0, 0], [])
    assert batch.buffers.first_tile[:, : batch.query_tiles * 3 + 1].abs().sum() == 0


def test_more_items_than_a_block() -> None:
    """400 rows of 3 heads: the running sum goes over two blocks of 1,024."""
    pages = requests()
    buffers = DecodeBuffers.allocate(400, 2, 3, 16, HALF, 700, DEVICE)
    batches = []
    for op in (schedule_decode, torch_ops.schedule_decode):
        for name in WRITTEN:
            getattr(buffers, name).fill_(-7)
        batch = DecodeBatch.of(buffers, 0, 400, 1, 1, 600, OPTIONS)
        request = torch.arange(400, device=DEVICE) % 3
        seq_lens = pages.prompt_tokens[request] + 1 + int32(list(range(400))) % 37
        starts = torch.arange(401, device=DEVICE).int()
        op(batch, pages, W, P, Rows(NO_BLOCKS, starts, seq_lens, request))
        batches.append([getattr(buffers, name).clone() for name in WRITTEN])
    for ours, theirs in zip(*batches, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_work_is_balanced_by_tokens_not_by_heads() -> None:
    """One head of 5,337 tokens among heads of 34, the published extremes: equal shares."""
    L, Hkv, programs = 1, 32, 64
    lengths = torch.full((1, L, Hkv), 34)
    lengths[0, 0, 7] = 5337
    pages = head_pages([8000], lengths, [20], P)
    batch = schedule(schedule_decode, pages, [1], [8001], [0], programs, G=1)
    total = int(batch.buffers.first_tile[0, Hkv])
    tiles = [-(-(kept + W + 1) // BLOCK_N) for kept in lengths.flatten().tolist()]
    assert total == sum(tiles) + Hkv * SETUP_TILES
    share = -(-total // programs)
    used = -(-total // share)
    assert total / used > 0.85 * share, "programs with work do nearly as much as the busiest"
    largest = -(-(5337 + W + 1) // BLOCK_N)
    assert largest > 40 * share, "by heads, one program would have done all of this"


@settings(max_examples=15)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    L, Hkv = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3, 7]))
    pages = requests(L, Hkv)
    request = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
    query_lens, seq_lens = [], []
    for _ in request:
        queries = data.draw(st.integers(0, 20))
        query_lens.append(queries)
        seq_lens.append(queries + data.draw(st.integers(0, 100)))
    padding = data.draw(st.integers(0, 2))
    query_lens[0] = max(1, query_lens[0])
    both(
        pages,
        [*query_lens, *[0] * padding],
        [*seq_lens, *[0] * padding],
        request,
        data.draw(st.integers(1, 40)),
        data.draw(st.sampled_from([1, 4, 7])),
    )


@pytest.mark.parametrize(
    ("change", "Hkv", "message"),
    [
        ({"query_start": torch.zeros(3, dtype=torch.int64)}, 3, "int32"),
        ({"query_start": torch.zeros(2, dtype=torch.int32)}, 3, "rows up to 2"),
        ({"seq_lens": torch.zeros(1, dtype=torch.int32)}, 3, "rows up to 2"),
        ({}, 5, "5 heads"),
    ],
)
def test_wrong_input(change: dict[str, torch.Tensor], Hkv: int, message: str) -> None:
    buffers = DecodeBuffers.allocate(4, 2, 3, 16, HALF, 2, DEVICE)
    batch = DecodeBatch.of(buffers, 0, 2, 1, 1)
    rows = replace(Rows(NO_BLOCKS, int32([0, 1, 2]), int32([62, 62]), int32([0, 0])), **change)
    with pytest.raises(ValueError, match=message):
        schedule_decode(batch, requests(Hkv=Hkv), W, P, rows)


def test_buffers_too_small() -> None:
    buffers = DecodeBuffers.allocate(4, 2, 3, 16, HALF, 2, DEVICE)
    with pytest.raises(ValueError, match="5 query tiles, but the buffers hold 4"):
        DecodeBatch.of(buffers, 0, 5, 1, 1)


def test_published_budgets_are_balanced(published: tuple[torch.Tensor, object]) -> None:
    """What the README says of batches of 8K prompts, on an H200: 264 programs, tiles of 128."""
    n, R = 8192, 8
    layout = CacheLayout.from_scores(published[0], 32, budget=256)
    kept = torch.from_numpy(layout.kept_tokens(n))
    pages = head_pages([n], kept[None], [layout.compact_blocks(n, 16)], 16)
    buffers = DecodeBuffers.allocate(R, 32, 32, 128, HALF, 264, DEVICE)
    batch = DecodeBatch.of(buffers, 0, R, 1, 1)
    starts = torch.arange(R + 1, dtype=torch.int32, device=DEVICE)
    requests = torch.zeros(R, dtype=torch.int64, device=DEVICE)
    rows = Rows(NO_BLOCKS, starts, int32([n + 1] * R), requests)
    schedule_decode(batch, pages, 32, 16, rows)
    work = buffers.first_tile[:, R * 32].cpu()  # KV tiles, and one more for each item
    busiest = -(-work // 264)
    assert busiest.sum() * 264 / work.sum() == pytest.approx(1.14, abs=0.005)
    tokens = kept + 33  # the window and one generated token
    by_heads = tokens.max(1).values.sum() * 32 / tokens.sum()
    assert by_heads == pytest.approx(7.1, abs=0.05)
