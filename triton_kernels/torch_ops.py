"""The kernels' torch twins: the same functions, float32 inside, for any device.

They loop over requests and may wait for the device. What each does to one request stands in
`reference`.
"""

import torch

from . import reference
from .batch import HeadPages, Prompts, PruneWorkspace, QueryTiles, Rows
from .decode_batch import SETUP_TILES, DecodeBatch
from .tables import (
    COMPACT_BLOCKS,
    FIRST_PAGE,
    FIRST_QUERY,
    KEPT,
    POSITION,
    PROMPT_BLOCKS,
    QUERIES,
    TAIL,
    TAIL_START,
    TARGET,
    TILE_ROW,
    Prompt,
)


def _read(prompts: Prompts) -> list[Prompt]:
    """What stands in the table, on the host."""
    return [Prompt(*numbers) for numbers in prompts.table.T.tolist()]


def window_scores(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    block_table: torch.Tensor,
    prompts: Prompts,
    workspace: PruneWorkspace,
    window: int,
    kernel_size: int,
    scale: float,
    k_scale: torch.Tensor | None = None,
) -> None:
    """See `window_scores.window_scores`."""
    page_size = layer_cache.shape[2]
    if k_scale is not None:
        scale *= float(k_scale)
    for prompt in _read(prompts):
        window_queries = query[prompt.query_end - window : prompt.query_end].transpose(0, 1)
        positions = torch.arange(prompt.tokens, device=query.device)
        row = block_table[prompt.batch_row]
        kv = reference.read_tokens(layer_cache, row, positions, -(-prompt.tokens // page_size), 0)
        keys = kv[..., : query.shape[2]]
        scores = reference.window_scores(window_queries, keys, kernel_size, scale)
        workspace.scores[:, prompt.offset : prompt.offset + prompt.tokens - window] = scores


def select_tokens(
    prompts: Prompts, workspace: PruneWorkspace, lengths: torch.Tensor, window: int
) -> None:
    """See `select_tokens.select_tokens`."""
    for prompt in _read(prompts):
        scores = workspace.scores[:, prompt.offset : prompt.offset + prompt.tokens - window]
        for head, kept in enumerate(reference.kept_tokens(scores, lengths[prompt.request])):
            workspace.positions[head, prompt.offset : prompt.offset + len(kept)] = kept


def compact_kv(
    cache: torch.Tensor,
    layer: int,
    block_table: torch.Tensor,
    prompts: Prompts,
    workspace: PruneWorkspace,
    pages: HeadPages,
) -> None:
    """See `compact_kv.compact_kv`."""
    P = cache.shape[3]
    raw = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    for prompt in _read(prompts):
        lengths = pages.lengths[prompt.request, layer]
        reference.compact_kv(
            raw,
            layer,
            block_table[prompt.batch_row],
            workspace.positions[:, prompt.offset : prompt.offset + int(lengths.max())].long(),
            lengths,
            pages.first_pages[prompt.request, layer],
            int(lengths.sum()),
            -(-prompt.tokens // P),
        )


def _is_pruned(rows: Rows, pages: HeadPages) -> torch.Tensor:
    """Whether each request attends to a pruned prompt, bool ``[R]``."""
    R = len(rows.requests)
    requests = rows.requests.long()
    computed = rows.seq_lens[:R] - rows.query_start.diff()[:R]
    return (pages.compact_blocks[requests] > 0) & (computed >= pages.prompt_tokens[requests])


def schedule_decode(
    batch: DecodeBatch,
    pages: HeadPages,
    window: int,
    page_size: int,
    rows: Rows,
) -> None:
    """See `schedule_decode.schedule_decode`."""
    L = pages.lengths.shape[1]
    buffers, device = batch.buffers, rows.query_start.device
    row = batch.first_row + torch.arange(batch.rows, device=device)
    real = row < len(rows.requests)
    request = torch.zeros_like(row)
    request[real] = rows.requests[row[real]].long()
    pruned = torch.zeros_like(real)
    pruned[real] = _is_pruned(rows, pages)[row[real]]

    n = pages.prompt_tokens[request]
    tail_start = torch.where(pruned, n - window, 0)
    start, end = rows.query_start[row], rows.query_start[row + 1]
    skipped = torch.arange(batch.tiles_per_row, device=device) * batch.block_q
    queries = (end - start)[:, None] - skipped
    queries = queries.clamp(0, batch.block_q)
    position = (rows.seq_lens[row] - end + start)[:, None] + skipped
    columns = {
        TILE_ROW: row[:, None],
        FIRST_QUERY: start[:, None] + skipped,
        QUERIES: queries,
        POSITION: position,
        TAIL_START: tail_start[:, None],
        PROMPT_BLOCKS: (-(-n // page_size) * pruned)[:, None],
        COMPACT_BLOCKS: (pages.compact_blocks[request] * pruned)[:, None],
        TAIL: (position + queries - tail_start[:, None]) * (queries > 0),
    }
    tiles = buffers.tiles[: batch.query_tiles]
    for column, values in columns.items():
        tiles[:, column] = values.expand_as(queries).flatten()
    buffers.arrived[: len(tiles) * pages.lengths.shape[2]] = 0
    max_pages = 0 if batch.page_units is None else batch.page_units.shape[1]

    tail = tiles[:, TAIL, None]
    for layer in range(L):
        kept, first = (
            (x[request, layer] * pruned[:, None]).repeat_interleave(batch.tiles_per_row, 0)
            for x in (pages.lengths, pages.first_pages)
        )
        first = first + (request * max_pages).repeat_interleave(batch.tiles_per_row)[:, None]
        read = SETUP_TILES + -(-(kept + tail) // batch.options.block_n)
        read = torch.where(tail > 0, read, 0)
        items = read.numel()
        buffers.items[layer, :items, KEPT] = kept.flatten()
        buffers.items[layer, :items, FIRST_PAGE] = first.flatten()
        buffers.first_tile[layer, 0] = 0
        buffers.first_tile[layer, 1 : items + 1] = read.flatten().cumsum(0)
        total = int(buffers.first_tile[layer, items])
        share = -(-total // batch.programs)
        begin = torch.arange(batch.programs, device=device, dtype=torch.int32) * share
        ends = buffers.first_tile[layer, 1 : items + 1].contiguous()
        found = torch.searchsorted(ends, begin, right=True).int()
        buffers.first_item[layer, : batch.programs] = found


def sparse_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    layer: int,
    block_table: torch.Tensor,
    batch: DecodeBatch,
    output: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `sparse_decode.sparse_decode`."""
    Hkv = cache.shape[2]
    if k_scale is not None:
        scale *= float(k_scale)
    for tile, row in enumerate(batch.buffers.tiles[: batch.query_tiles].tolist()):
        if not row[QUERIES]:
            continue
        items = batch.buffers.items[layer, tile * Hkv : (tile + 1) * Hkv]
        kept, first_page = items[:, KEPT], items[:, FIRST_PAGE]
        if batch.page_units is not None:
            first_page = first_page % batch.page_units.shape[1]
        seq_len = row[POSITION] + row[QUERIES]
        own = slice(row[FIRST_QUERY], row[FIRST_QUERY] + row[QUERIES])
        out = reference.sparse_decode(
            query[own].float(),
            cache,
            layer,
            block_table[row[TILE_ROW]],
            kept,
            first_page,
            int(kept.max()),
            row[TAIL_START],
            row[PROMPT_BLOCKS],
            row[COMPACT_BLOCKS],
            torch.tensor(seq_len, device=query.device),
            seq_len,
            scale,
        )
        output[own] = (out if v_scale is None else out * v_scale).to(output.dtype)


def correct_slots(
    slots: torch.Tensor,
    positions: torch.Tensor,
    rows: Rows,
    pages: HeadPages,
    page_size: int,
    max_query_len: int,
) -> None:
    """See `correct_slots.correct_slots`."""
    for row in _is_pruned(rows, pages).nonzero().flatten().tolist():
        request = int(rows.requests[row])
        own = slice(*rows.query_start[row : row + 2].tolist())
        position = positions[own]
        entry = position // page_size
        prompt_blocks = -(-int(pages.prompt_tokens[request]) // page_size)
        moved = entry + pages.compact_blocks[request]
        entry = torch.where(entry < prompt_blocks, entry, moved)
        slots[own] = rows.block_table[row][entry].long() * page_size + position % page_size


def list_pages(
    cache: torch.Tensor, block_table: torch.Tensor, prompts: Prompts, pages: HeadPages
) -> None:
    """See `list_pages.list_pages`."""
    assert pages.page_units is not None
    L, _, Hkv, page_size, width = cache.shape
    strides = [stride // width for stride in cache.stride()[:3]]
    for prompt in _read(prompts):
        compact_blocks = int(pages.compact_blocks[prompt.request])
        page = torch.arange(compact_blocks * L * Hkv, device=cache.device)
        entry = -(-prompt.tokens // page_size) + page // (L * Hkv)
        block = block_table[prompt.batch_row, entry]
        units = page // Hkv % L * strides[0] + block * strides[1] + page % Hkv * strides[2]
        pages.page_units[prompt.request, : len(page)] = units.int()


def top_keys(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: QueryTiles,
    output: torch.Tensor,
) -> None:
    """See `top_keys.top_keys`."""
    D, page_size = query.shape[2], layer_cache.shape[2]
    for tile in tiles.table.tolist():
        first, target, queries = tile[FIRST_QUERY], tile[TARGET], tile[QUERIES]
        n = tile[POSITION] + queries
        positions = torch.arange(n, device=query.device)
        row = block_table[tile[TILE_ROW]]
        kv = reference.read_tokens(layer_cache, row, positions, -(-n // page_size), 0)
        own = query[first : first + queries].transpose(0, 1)
        output[target : target + queries] = reference.top_keys(own, kv[..., :D]).T


__all__ = [
    "compact_kv",
    "correct_slots",
    "list_pages",
    "schedule_decode",
    "select_tokens",
    "sparse_decode",
    "top_keys",
    "window_scores",
]
