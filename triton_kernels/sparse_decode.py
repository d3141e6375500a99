"""Attention of generated tokens over pruned and unpruned requests, one kernel for both.

What a layer costs:

* **Bytes**: the kept keys and values once, ``2 * D`` elements a token and KV head. For each there
  are ``4 * D * G`` FLOP a query: with 16-bit elements `G * Q` FLOP a byte, far below what a GPU
  needs to be busy computing (H200: 180). Rows of queries that pad a tile to 16 cost nothing.
* **Instructions**: a KV tile of 128 tokens is 64 KiB (16 bits, `D` 128) and some 430 instructions
  of each warp, most of them addresses. Long heads are bound by bytes only if these are few.
* **Beginnings**: a program that begins an item waits for its schedule, then for its query and block
  numbers, then for its first tile. At the end it stores a result. Together that takes about as
  long as a tile. With a budget of 256 tokens the median head keeps some 70, one tile: there the
  beginnings cost more than the bytes.

So every program gets the same amount of work, counted in tiles and beginnings of items, wherever
the heads end; what several programs share is combined by the last of them that has finished.
`benchmarks/decode_model.py` puts numbers to it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import tables
from .cache import cache_units
from .decode_batch import SETUP_TILES, DecodeBatch


@triton.jit
def _combine_parts(
    partial_ptr,
    stats_ptr,
    first_program,
    last_program,
    rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """An item's output ``[BLOCK_R, BLOCK_D]`` from what all of its programs have stored.

    `PARTS` at a time, as many as registers hold, each in slots of its own, which are summed up at
    the end: what counts is how many loads are on their way.
    """
    SLOTS: tl.constexpr = PARTS * BLOCK_R
    slot, d = tl.arange(0, SLOTS), tl.arange(0, BLOCK_D)
    row = slot % BLOCK_R
    m = tl.full([SLOTS], float("-inf"), tl.float32)
    norm = tl.zeros([SLOTS], tl.float32)
    acc = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    for begin in range(first_program, last_program + 1, PARTS):
        program = begin + slot // BLOCK_R
        there = (program <= last_program) & (row < rows)
        # The item is the last one of its first program, and the first one of the others.
        part = program * 2 + (program == first_program).to(tl.int32)
        part_row = part * ROWS + row
        # Others wrote this during the launch: past the multiprocessor's own cache.
        m_ptr = stats_ptr + part_row * 2
        part_m = tl.load(m_ptr, there, float("-inf"), cache_modifier=".cg")
        part_norm = tl.load(m_ptr + 1, there, 0.0, cache_modifier=".cg")
        acc_ptr = partial_ptr + part_row[:, None] * D + d[None, :]
        mask = there[:, None] & (d < D)[None, :]
        part_acc = tl.load(acc_ptr, mask, 0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, part_m)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, beta = tl.exp2(m - shift), tl.exp2(part_m - shift)
        norm = norm * alpha + part_norm * beta
        acc = acc * alpha[:, None] + part_acc * beta[:, None]
        m = m_new
    if PARTS > 1:
        m = tl.reshape(m, (PARTS, BLOCK_R))
        top = tl.max(m, 0)
        weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top)[None, :])
        norm = tl.sum(tl.reshape(norm, (PARTS, BLOCK_R)) * weight, 0)
        acc = tl.sum(tl.reshape(acc, (PARTS, BLOCK_R, BLOCK_D)) * weight[:, :, None], 0)
    return acc / tl.where(norm == 0, 1.0, norm)[:, None]  # rows that have seen nothing


@triton.jit(do_not_specialize=["layer", "num_items", "stride_items", "stride_programs"])
def _sparse_decode(
    query_ptr,
    cache_ptr,
    block_table_ptr,
    page_units_ptr,
    output_ptr,
    k_scale_ptr,
    v_scale_ptr,
    tiles_ptr,
    items_ptr,
    first_tile_ptr,
    first_item_ptr,
    arrived_ptr,
    partial_ptr,
    stats_ptr,
    layer,
    num_items,
    softmax_scale,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_cl,
    stride_cb,
    stride_ch,
    stride_cp,
    stride_table,
    stride_items,
    stride_programs,
    L: tl.constexpr,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SETUP: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    HAS_PAGE_UNITS: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    CONVERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
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
    program = tl.program_id(0)
    items_ptr += layer.to(tl.int64) * ITEM_COLUMNS * stride_items
    first_tile_ptr += layer.to(tl.int64) * (stride_items + 1)
    total = tl.load(first_tile_ptr + num_items)
    share = tl.cdiv(total, tl.num_programs(0))
    tile = program * share
    last = tl.minimum(tile + share, total)
    item = tl.load(first_item_ptr + layer * stride_programs + program)

    scale = softmax_scale * 1.4426950408889634  # exp2 instead of exp
    if HAS_K_SCALE:
        scale *= tl.load(k_scale_ptr)
    m_row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    token = tl.arange(0, BLOCK_N)
    # Strides of the cache are in units of a token's 2 * D elements: 32 bits hold every sum.
    PAGES: tl.constexpr = L * Hkv  # of a block, in all layers

    while tile < last:
        begin = tl.load(first_tile_ptr + item) + SETUP  # its first KV tile
        end = tl.load(first_tile_ptr + item + 1)
        item_ptr = items_ptr + ITEM_COLUMNS * item
        kept = tl.load(item_ptr + KEPT)
        first_page = tl.load(item_ptr + FIRST_PAGE)
        tile_ptr = tiles_ptr + TILE_COLUMNS * (item // Hkv)
        batch_row = tl.load(tile_ptr + TILE_ROW).to(tl.int64)
        first_query = tl.load(tile_ptr + FIRST_QUERY).to(tl.int64)
        queries = tl.load(tile_ptr + QUERIES)
        position = tl.load(tile_ptr + POSITION)
        tail_start = tl.load(tile_ptr + TAIL_START)
        prompt_blocks = tl.load(tile_ptr + PROMPT_BLOCKS)
        compact_blocks = tl.load(tile_ptr + COMPACT_BLOCKS)
        tokens = kept + tl.load(tile_ptr + TAIL)
        head = item % Hkv

        first = tl.maximum(tile, begin)
        stop = tl.minimum(end, last)
        if first < stop:
            table_ptr = block_table_ptr + batch_row * stride_table
            tail_unit = layer * stride_cl + head * stride_ch

            # All query heads of the group are rows of one tile.
            q_index = m_row // G
            q_head = head * G + m_row % G
            q_valid = q_index < queries
            q_offset = (first_query + q_index)[:, None] * stride_qt + q_head[:, None] * stride_qh
            q_mask = q_valid[:, None] & in_head[None, :]
            if PDL:  # what the kernel before wrote: queries, and the newest keys and values
                tl.extra.cuda.gdc_wait()
            q = tl.load(query_ptr + q_offset + d[None, :], q_mask, 0.0)
            if CONVERTS:
                q = (q.to(tl.float32) * scale).to(tl.float16)
            q_position = position + q_index

            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            norm = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for i in tl.range(first - begin, stop - begin, num_stages=STAGES):
                # Past the end the last token is read again, and not seen: loads need no mask.
                t = tl.minimum(i * BLOCK_N + token, tokens - 1)
                valid = i * BLOCK_N + token < tokens
                held = t < kept
                # A kept token lies in a head page, the others where their position says. Unsigned:
                # dividing by a power of two is then one instruction.
                place = t + (tail_start - kept)
                slot = (tl.where(held, t, place).to(tl.uint32) % P).to(tl.int32)
                page = (t.to(tl.uint32) // P).to(tl.int32) + first_page
                entry = (place.to(tl.uint32) // P).to(tl.int32)
                entry += tl.where(entry < prompt_blocks, 0, compact_blocks)
                if HAS_PAGE_UNITS:
                    place_ptr = tl.where(held, page_units_ptr + page, table_ptr + entry)
                    found = tl.load(place_ptr)
                    unit = tl.where(held, found, found * stride_cb + tail_unit)
                else:
                    page = page.to(tl.uint32)
                    in_block = page % PAGES
                    held_entry = prompt_blocks + (page // PAGES).to(tl.int32)
                    block = tl.load(table_ptr + tl.where(held, held_entry, entry))
                    held_unit = (in_block // Hkv).to(tl.int32) * stride_cl
                    held_unit += (in_block % Hkv).to(tl.int32) * stride_ch
                    unit = tl.where(held, held_unit, tail_unit) + block * stride_cb
                offset = (unit + slot * stride_cp).to(tl.int64) * (2 * D)
                kv_ptr = cache_ptr + offset[:, None] + d[None, :]
                if D == BLOCK_D:
                    k = tl.load(kv_ptr).to(q.dtype)
                else:
                    k = tl.load(kv_ptr, in_head[None, :], 0.0).to(q.dtype)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if not CONVERTS:
                    s *= scale
                seen = valid[None, :]
                if not ONE_QUERY:  # the only query of a tile sees all of its tokens
                    seen &= held[None, :] | (place[None, :] <= q_position[:, None])
                s = tl.where(seen, s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, 1))
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen nothing
                p = tl.exp2(s - shift[:, None])
                alpha = tl.exp2(m - shift)
                norm = norm * alpha + tl.sum(p, 1)
                # Transposed and back: fp8 values would else be loaded 8 bytes at a time.
                if D == BLOCK_D:
                    v = tl.load(kv_ptr + D)
                else:
                    v = tl.load(kv_ptr + D, in_head[None, :], 0.0)
                v = tl.trans(tl.trans(v).to(q.dtype))
                acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
                m = m_new

            if (first == begin) & (stop == end):  # the whole item
                out = acc / tl.where(norm == 0, 1.0, norm)[:, None]  # rows that have seen nothing
                if HAS_V_SCALE:
                    out *= tl.load(v_scale_ptr)
                o_offset = (first_query + q_index)[:, None] * stride_ot
                o_offset += q_head[:, None] * stride_oh
                tl.store(output_ptr + o_offset + d[None, :], out, q_mask)
            else:
                part = program * 2 + (first == begin).to(tl.int32)
                part_row = part.to(tl.int64) * ROWS + m_row
                tl.store(partial_ptr + part_row[:, None] * D + d[None, :], acc, q_mask)
                tl.store(stats_ptr + part_row * 2, m, q_valid)
                tl.store(stats_ptr + part_row * 2 + 1, norm, q_valid)
                first_program = begin // share
                last_program = (end - 1) // share
                tl.debug_barrier()  # all of this is stored before the program says so
                earlier = tl.atomic_add(arrived_ptr + item, 1, sem="acq_rel")
                if earlier == last_program - first_program:
                    tl.store(arrived_ptr + item, 0)  # for the next layer
                    out = _combine_parts(
                        partial_ptr,
                        stats_ptr,
                        first_program,
                        last_program,
                        queries * G,
                        D,
                        ROWS,
                        PARTS,
                        BLOCK_R,
                        BLOCK_D,
                    )
                    if HAS_V_SCALE:
                        out *= tl.load(v_scale_ptr)
                    r = tl.arange(0, BLOCK_R)
                    o_offset = (first_query + r // G)[:, None] * stride_ot
                    o_offset += (head * G + r % G)[:, None] * stride_oh
                    o_mask = (r < queries * G)[:, None] & in_head[None, :]
                    tl.store(output_ptr + o_offset + d[None, :], out, o_mask)
        tile = stop
        item += 1


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
) -> Any:
    """Causal attention of the scheduled rows: head pages first, then the tail.

    Pruned rows attend per KV head to what it kept, then to the tokens from ``n - W`` on; the others
    to all of their tokens. What each program computes stands in the schedule, on the device, so a
    launch can be captured in a CUDA graph. Flash decoding with the split of `schedule_decode`.

    Args:
        query: queries of the step, ``[T, Hq, D]``.
        cache: keys and values, ``[L, B, Hkv, P, 2 * D]``, fp8 (e4m3) or the query's dtype.
        layer: index of the layer that attends.
        block_table: block numbers of each row, int32 ``[R, max_blocks]``.
        batch: rows to compute; `schedule_decode` has written their schedule.
        output: attention of the queries, ``[T, Hq, D]``; only the scheduled queries are written.
        scale: factor of the logits.
        k_scale: scale of the cached keys, float32, one element; 1 if not given.
        v_scale: scale of the cached values, float32, one element; 1 if not given.

    Returns:
        Triton's compiled kernel, which knows its registers; None in the interpreter.

    Raises:
        ValueError: for shapes, strides or dtypes that do not fit together.
    """
    _, Hq, D = query.shape
    L, _, Hkv, P, width = cache.shape
    G = Hq // Hkv
    buffers, options = batch.buffers, batch.options
    BLOCK_R, BLOCK_D = triton.next_power_of_2(batch.block_q * G), triton.next_power_of_2(D)
    if width != 2 * D or Hq % Hkv or output.shape != query.shape:
        raise ValueError(
            f"query {list(query.shape)} [T, Hq, D], output {list(output.shape)} and cache "
            f"{list(cache.shape)} [L, B, Hkv, P, 2 * D] do not fit together"
        )
    if query.stride(2) != 1 or output.stride(2) != 1:
        raise ValueError("the last dimension of query and output must be contiguous")
    if cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a cache of {cache.dtype} beside queries of {query.dtype}")
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError("block_table must be int32 with contiguous rows")
    return _sparse_decode[(batch.programs,)](
        query,
        cache,
        block_table,
        batch.page_units,
        output,
        k_scale,
        v_scale,
        buffers.tiles,
        buffers.items,
        buffers.first_tile,
        buffers.first_item,
        buffers.arrived,
        buffers.partial,
        buffers.stats,
        layer,
        batch.query_tiles * Hkv,
        scale,
        *query.stride()[:2],
        *output.stride()[:2],
        *cache_units(cache),
        block_table.stride(0),
        buffers.items.shape[1],
        buffers.max_programs,
        L=L,
        Hkv=Hkv,
        G=G,
        D=D,
        P=P,
        ROWS=buffers.max_rows,
        PARTS=max(1, min(16, (8192 if BLOCK_R <= 16 else 4096) // (BLOCK_R * BLOCK_D))),
        SETUP=SETUP_TILES,
        HAS_K_SCALE=k_scale is not None,
        HAS_V_SCALE=v_scale is not None,
        HAS_PAGE_UNITS=batch.page_units is not None,
        ONE_QUERY=batch.block_q == 1,
        # e4m3 becomes float16 in one instruction and without an error, bfloat16 in several. Scaled
        # queries fit into float16: an overflow would be a logit of tens of thousands.
        CONVERTS=cache.dtype == torch.float8_e4m3fn and query.dtype != torch.float32,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        BLOCK_M=batch.block_m,
        BLOCK_R=BLOCK_R,
        BLOCK_N=options.block_n,
        BLOCK_D=BLOCK_D,
        STAGES=options.stages,
        PDL=options.pdl,
        num_warps=options.num_warps,
        maxnreg=options.maxnreg,
        **({"launch_pdl": True} if options.pdl else {}),
    )
