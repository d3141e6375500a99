"""The kernels' torch twins: the same functions, float32 inside, for any device.

They loop over requests and may wait for the device. What each does to one request stands in
`reference`.
"""

import torch

from . import reference
from .batch import (
    COMPACT_BLOCKS,
    FIRST_QUERY,
    POSITION,
    PROMPT_BLOCKS,
    QUERIES,
    TAIL,
    TAIL_START,
    TILE_ROW,
    HeadPages,
    Prompts,
    PruneWorkspace,
    QueryTiles,
)
from .decode_batch import SETUP_TILES, DecodeBatch


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
    for batch_row, _, end, n, offset in prompts.table.T.tolist():
        window_queries = query[end - window : end].transpose(0, 1)
        positions = torch.arange(n, device=query.device)
        row = block_table[batch_row]
        kv = reference.read_tokens(layer_cache, row, positions, -(-n // page_size), 0)
        keys = kv[..., : query.shape[2]]
        scores = reference.window_scores(window_queries, keys, kernel_size, scale)
        workspace.scores[:, offset : offset + n - window] = scores


def select_tokens(
    prompts: Prompts, workspace: PruneWorkspace, lengths: torch.Tensor, window: int
) -> None:
    """See `select_tokens.select_tokens`."""
    for _, request, _, n, offset in prompts.table.T.tolist():
        scores = workspace.scores[:, offset : offset + n - window]
        for head, kept in enumerate(reference.kept_tokens(scores, lengths[request])):
            workspace.positions[head, offset : offset + len(kept)] = kept


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
    for batch_row, request, _, n, offset in prompts.table.T.tolist():
        lengths = pages.lengths[request, layer]
        reference.compact_kv(
            raw,
            layer,
            block_table[batch_row],
            workspace.positions[:, offset : offset + int(lengths.max())].long(),
            lengths,
            pages.first_pages[request, layer],
            int(lengths.sum()),
            -(-n // P),
        )


def _is_pruned(
    query_start: torch.Tensor, seq_lens: torch.Tensor, requests: torch.Tensor, pages: HeadPages
) -> torch.Tensor:
    """Rows of real requests that attend to a pruned prompt, bool ``[R]``."""
    R = len(requests)
    requests = requests.long()
    computed = seq_lens[:R] - query_start.diff()[:R]
    return (pages.compact_blocks[requests] > 0) & (computed >= pages.prompt_tokens[requests])


def schedule_decode(
    batch: DecodeBatch,
    pages: HeadPages,
    window: int,
    page_size: int,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    requests: torch.Tensor,
) -> None:
    """See `schedule_decode.schedule_decode`."""
    L = pages.lengths.shape[1]
    buffers, device = batch.buffers, query_start.device
    row = batch.first_row + torch.arange(batch.rows, device=device)
    real = row < len(requests)
    request = torch.zeros_like(row)
    request[real] = requests[row[real]].long()
    pruned = torch.zeros_like(real)
    pruned[real] = _is_pruned(query_start, seq_lens, requests, pages)[row[real]]

    n = pages.prompt_tokens[request]
    tail_start = torch.where(pruned, n - window, 0)
    start, end = query_start[row], query_start[row + 1]
    skipped = torch.arange(batch.tiles_per_row, device=device) * batch.block_q
    queries = (end - start)[:, None] - skipped
    queries = queries.clamp(0, batch.block_q)
    position = (seq_lens[row] - end + start)[:, None] + skipped
    shared = (
        row,
        tail_start,
        -(-n // page_size) * pruned,
        pages.compact_blocks[request] * pruned,
    )
    table_row, tail_start, prompt_blocks, compact_blocks = (x[:, None] for x in shared)
    columns = torch.broadcast_tensors(
        table_row,
        start[:, None] + skipped,
        queries,
        position,
        tail_start,
        prompt_blocks,
        compact_blocks,
        (position + queries - tail_start) * (queries > 0),
    )
    tiles = torch.stack(columns, -1).reshape(-1, 8).int()
    buffers.rows[: len(tiles)] = tiles
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
        buffers.items[layer, :items] = torch.stack([kept, first], -1).reshape(items, 2)
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
    for tile, row in enumerate(batch.buffers.rows[: batch.query_tiles].tolist()):
        if not row[QUERIES]:
            continue
        items = batch.buffers.items[layer, tile * Hkv : (tile + 1) * Hkv]
        seq_len = row[POSITION] + row[QUERIES]
        own = slice(row[FIRST_QUERY], row[FIRST_QUERY] + row[QUERIES])
        out = reference.sparse_decode(
            query[own].float(),
            cache,
            layer,
            block_table[row[TILE_ROW]],
            items[:, 0],
            items[:, 1] if batch.page_units is None else items[:, 1] % batch.page_units.shape[1],
            int(items[:, 0].max()),
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
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    requests: torch.Tensor,
    pages: HeadPages,
    page_size: int,
    max_query_len: int,
) -> None:
    """See `correct_slots.correct_slots`."""
    pruned = _is_pruned(query_start, seq_lens, requests, pages).nonzero().flatten().tolist()
    for row in pruned:
        request = int(requests[row])
        own = slice(*query_start[row : row + 2].tolist())
        position = positions[own]
        entry = position // page_size
        prompt_blocks = -(-int(pages.prompt_tokens[request]) // page_size)
        moved = entry + pages.compact_blocks[request]
        entry = torch.where(entry < prompt_blocks, entry, moved)
        slots[own] = block_table[row][entry].long() * page_size + position % page_size


def list_pages(
    cache: torch.Tensor, block_table: torch.Tensor, prompts: Prompts, pages: HeadPages
) -> None:
    """See `list_pages.list_pages`."""
    assert pages.page_units is not None
    L, _, Hkv, page_size, width = cache.shape
    strides = [stride // width for stride in cache.stride()[:3]]
    for row, request, _, n, _ in prompts.table.T.tolist():
        page = torch.arange(int(pages.compact_blocks[request]) * L * Hkv, device=cache.device)
        block = block_table[row, -(-n // page_size) + page // (L * Hkv)]
        units = page // Hkv % L * strides[0] + block * strides[1] + page % Hkv * strides[2]
        pages.page_units[request, : len(page)] = units.int()


def top_keys(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: QueryTiles,
    output: torch.Tensor,
) -> None:
    """See `top_keys.top_keys`."""
    D, page_size = query.shape[2], layer_cache.shape[2]
    for batch_row, first, queries, position, target in tiles.table.tolist():
        n = position + queries
        positions = torch.arange(n, device=query.device)
        row = block_table[batch_row]
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
