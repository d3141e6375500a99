"""Spreads a step's decode attention evenly over the device, by what it costs, not by heads."""

import torch
import triton
import triton.language as tl

from . import tables
from .batch import HeadPages, Rows
from .decode_batch import SETUP_TILES, DecodeBatch

# Items, and programs, that a layer's program counts at a time. One an own thread: the time of a
# step's schedule is that of a few dependent loads for each block of items.
BLOCK_ITEMS = 1024
BLOCK_PROGRAMS = 512
NUM_WARPS = 16


@triton.jit(
    do_not_specialize=[
        "stride_items",
        "stride_programs",
        "first_row",
        "num_items",
        "num_requests",
        "tiles_per_row",
        "block_q",
        "programs",
        "max_pages",
    ]
)
def _schedule_decode(
    query_start_ptr,
    seq_lens_ptr,
    requests_ptr,
    prompt_tokens_ptr,
    compact_blocks_ptr,
    lengths_ptr,
    first_pages_ptr,
    tiles_ptr,
    items_ptr,
    first_tile_ptr,
    first_item_ptr,
    arrived_ptr,
    stride_request,
    stride_layer,
    stride_head,
    stride_items,
    stride_programs,
    first_row,
    num_items,
    num_requests,
    window,
    page_size,
    tiles_per_row,
    block_q,
    programs,
    max_pages,
    Hkv: tl.constexpr,
    SETUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr = tables.TILE_COLUMNS,
    TILE_ROW: tl.constexpr = tables.TILE_ROW,
    FIRST_QUERY: tl.constexpr = tables.FIRST_QUERY,
    QUERIES: tl.constexpr = tables.QUERIES,
    POSITION: tl.constexpr = tables.POSITION,
    TAIL_START: tl.constexpr = tables.TAIL_START,
    PROMPT_BLOCKS: tl.constexpr = tables.PROMPT_BLOCKS,
    COMPACT_BLOCKS: tl.constexpr = tables.COMPACT_BLOCKS,
    TAIL: tl.constexpr = tables.TAIL,
    ITEM_COLUMNS: tl.constexpr = tables.ITEM_COLUMNS,
    KEPT: tl.constexpr = tables.KEPT,
    FIRST_PAGE: tl.constexpr = tables.FIRST_PAGE,
):
    layer = tl.program_id(0)
    items_ptr += layer.to(tl.int64) * ITEM_COLUMNS * stride_items
    first_tile_ptr += layer.to(tl.int64) * (stride_items + 1)

    # Each item's KV tiles, and its set-up, summed up.
    total = 0
    tl.store(first_tile_ptr, 0)
    for block in range(0, num_items, BLOCK_ITEMS):
        item = block + tl.arange(0, BLOCK_ITEMS)
        inside = item < num_items
        query_tile, head = item // Hkv, item % Hkv
        row = first_row + query_tile // tiles_per_row
        skipped = query_tile % tiles_per_row * block_q

        start = tl.load(query_start_ptr + row, inside, 0)
        end = tl.load(query_start_ptr + row + 1, inside, 0)
        seq_len = tl.load(seq_lens_ptr + row, inside, 0)
        queries = tl.minimum(tl.maximum(end - start - skipped, 0), block_q)
        computed = seq_len - (end - start)

        # Padded rows belong to no request, and a prompt that is being computed is dense still.
        real = inside & (row < num_requests)
        request = tl.load(requests_ptr + row, real, 0).to(tl.int64)
        n = tl.load(prompt_tokens_ptr + request, real, 0)
        compact_blocks = tl.load(compact_blocks_ptr + request, real, 0)
        pruned = real & (compact_blocks > 0) & (computed >= n)
        page = request * stride_request + layer * stride_layer + head * stride_head
        kept = tl.load(lengths_ptr + page, pruned, 0)
        first_page = tl.load(first_pages_ptr + page, pruned, 0)
        tail_start = tl.where(pruned, n - window, 0)
        position = computed + skipped
        tail = tl.where(queries > 0, position + queries - tail_start, 0)
        tokens = tl.where(queries > 0, kept + tail, 0)
        tiles = tl.where(tokens > 0, SETUP + (tokens + BLOCK_N - 1) // BLOCK_N, 0)

        tl.store(first_tile_ptr + 1 + item, total + tl.cumsum(tiles), inside)
        total += tl.sum(tiles)
        item_ptr = items_ptr + ITEM_COLUMNS * item
        tl.store(item_ptr + KEPT, kept, inside)
        tl.store(item_ptr + FIRST_PAGE, request.to(tl.int32) * max_pages + first_page, inside)
        # Zero already, unless a sleeping engine has lost its memory.
        tl.store(arrived_ptr + item, 0, inside & (layer == 0))
        once = inside & (layer == 0) & (head == 0)
        tile_ptr = tiles_ptr + TILE_COLUMNS * query_tile
        tl.store(tile_ptr + TILE_ROW, row, once)
        tl.store(tile_ptr + FIRST_QUERY, start + skipped, once)
        tl.store(tile_ptr + QUERIES, queries, once)
        tl.store(tile_ptr + POSITION, position, once)
        tl.store(tile_ptr + TAIL_START, tail_start, once)
        prompt_blocks = tl.where(pruned, (n + page_size - 1) // page_size, 0)
        tl.store(tile_ptr + PROMPT_BLOCKS, prompt_blocks, once)
        tl.store(tile_ptr + COMPACT_BLOCKS, tl.where(pruned, compact_blocks, 0), once)
        tl.store(tile_ptr + TAIL, tail, once)

    # Where each program begins: the last item with no more tiles before it than its own first one.
    tl.debug_barrier()
    share = tl.cdiv(total, programs)
    for block in range(0, programs, BLOCK_PROGRAMS):
        program = block + tl.arange(0, BLOCK_PROGRAMS)
        begin = program * share
        low = tl.zeros_like(program)  # items that end at or before `begin`, counted by bisection
        high = tl.zeros_like(program) + num_items
        size = num_items
        while size > 0:
            middle = (low + high) // 2
            ends = tl.load(first_tile_ptr + 1 + middle, low < high, 0)
            before = ends <= begin
            low = tl.where((low < high) & before, middle + 1, low)
            high = tl.where((low < high) & ~before, middle, high)
            size = size // 2
        tl.store(first_item_ptr + layer * stride_programs + program, low, program < programs)


def schedule_decode(
    batch: DecodeBatch,
    pages: HeadPages,
    window: int,
    page_size: int,
    rows: Rows,
) -> None:
    """Write the schedule of one step's decode rows, for all layers, into the batch's buffers.

    A row is attended to as pruned if its request is and its prompt has been computed; only the
    device knows that, as it alone knows how many draft tokens were accepted. The decomposition is
    stream-K's: equal shares of the work for all programs, cut wherever they end; work is KV tiles
    and a part for each item, see `DecodeBuffers`. Source: Osama et al.,
    https://arxiv.org/abs/2301.03598; for attention Sanovar et al.,
    https://arxiv.org/abs/2405.10480.

    Args:
        batch: decode rows of the step; its buffers are written.
        pages: head pages of all requests.
        window: tokens of the observation window, `W`.
        page_size: tokens of a page, `P`.
        rows: rows of the step's batch; their block table is not read.

    Raises:
        ValueError: for tensors of another type, or pages of other heads than the buffers'.
    """
    buffers, query_start, seq_lens = batch.buffers, rows.query_start, rows.seq_lens
    L, Hkv = pages.lengths.shape[1:]
    if query_start.dtype != torch.int32 or seq_lens.dtype != torch.int32:
        raise ValueError("query_start and seq_lens must be int32")
    if buffers.items.shape[:2] != (L, buffers.tiles.shape[0] * Hkv):
        raise ValueError(
            f"the buffers hold {list(buffers.items.shape[:2])} [L, items], not "
            f"{[L, buffers.tiles.shape[0] * Hkv]} as the pages' {L} layers and {Hkv} heads need"
        )
    last = batch.first_row + batch.rows
    if query_start.shape[0] <= last or seq_lens.shape[0] < last:
        raise ValueError(
            f"rows up to {last}, but query_start has {query_start.shape[0]} and seq_lens "
            f"{seq_lens.shape[0]}"
        )
    _schedule_decode[(L,)](
        query_start,
        seq_lens,
        rows.requests,
        pages.prompt_tokens,
        pages.compact_blocks,
        pages.lengths,
        pages.first_pages,
        buffers.tiles,
        buffers.items,
        buffers.first_tile,
        buffers.first_item,
        buffers.arrived,
        *pages.lengths.stride(),
        buffers.items.shape[1],
        buffers.max_programs,
        batch.first_row,
        batch.query_tiles * Hkv,
        len(rows.requests),
        window,
        page_size,
        batch.tiles_per_row,
        batch.block_q,
        batch.programs,
        0 if batch.page_units is None else batch.page_units.shape[1],
        Hkv=Hkv,
        SETUP=SETUP_TILES,
        BLOCK_N=batch.options.block_n,
        BLOCK_ITEMS=BLOCK_ITEMS,
        BLOCK_PROGRAMS=BLOCK_PROGRAMS,
        num_warps=NUM_WARPS,
    )
