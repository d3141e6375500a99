"""Attention of generated tokens over pruned and unpruned requests, one kernel for both.

Per layer it moves the kept keys and values once, ``2 * D`` elements a token and KV head, and
computes ``4 * D * G`` FLOP a query for each: with 16-bit elements `G * Q` FLOP a byte, far below
what a GPU needs to be busy computing (H200: 180). So bandwidth is all that counts: every program
streams the same number of KV tiles, and rows of queries that pad a tile to 16 cost nothing.
"""

import torch
import triton
import triton.language as tl

from .batch import DecodeBatch, query_block


def launch_options(block_m: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Warps, registers and pipeline stages: the compiler may use what a program can have.

    Five stages: a tile's block numbers, the addresses made of them, two tiles in flight, one in
    use. With three a tile is fetched while other programs compute.

    Args:
        block_m: rows of a query tile.
        D: head size.
        dtype: of the queries.
    """
    if dtype == torch.float32:
        return {"num_warps": 8, "maxnreg": 255, "STAGES": 2}
    return {
        "num_warps": 8 if block_m > 16 else 4,
        "maxnreg": 255,
        "STAGES": 3 if D > 128 else 5,
    }


@triton.jit(do_not_specialize=["layer", "num_items"])
def _sparse_decode(
    query_ptr,
    cache_ptr,
    block_table_ptr,
    output_ptr,
    k_scale_ptr,
    v_scale_ptr,
    rows_ptr,
    items_ptr,
    first_tile_ptr,
    first_item_ptr,
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
    L: tl.constexpr,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    items_ptr += layer.to(tl.int64) * 2 * stride_items
    first_tile_ptr += layer.to(tl.int64) * (stride_items + 1)
    total = tl.load(first_tile_ptr + num_items)
    share = tl.cdiv(total, PROGRAMS)
    tile = program * share
    last = tl.minimum(tile + share, total)
    item = tl.load(first_item_ptr + layer * PROGRAMS + program)

    scale = softmax_scale * 1.4426950408889634  # exp2 instead of exp
    if HAS_K_SCALE:
        scale *= tl.load(k_scale_ptr)
    m_row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    token = tl.arange(0, BLOCK_N)

    while tile < last:
        begin = tl.load(first_tile_ptr + item)
        end = tl.load(first_tile_ptr + item + 1)
        kept = tl.load(items_ptr + 2 * item)
        first_page = tl.load(items_ptr + 2 * item + 1)
        row_ptr = rows_ptr + 8 * (item // Hkv)
        batch_row = tl.load(row_ptr).to(tl.int64)
        first_query = tl.load(row_ptr + 1).to(tl.int64)
        queries = tl.load(row_ptr + 2)
        position = tl.load(row_ptr + 3)
        tail_start = tl.load(row_ptr + 4)
        prompt_blocks = tl.load(row_ptr + 5)
        compact_blocks = tl.load(row_ptr + 6)
        tokens = kept + tl.load(row_ptr + 7)
        head = item % Hkv
        table_ptr = block_table_ptr + batch_row * stride_table

        # All query heads of the group are rows of one tile.
        q_index = m_row // G
        q_head = head * G + m_row % G
        q_valid = q_index < queries
        q_offset = (first_query + q_index)[:, None] * stride_qt + q_head[:, None] * stride_qh
        q_mask = q_valid[:, None] & in_head[None, :]
        q = tl.load(query_ptr + q_offset + d[None, :], q_mask, 0.0)
        q_position = position + q_index

        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        stop = tl.minimum(end, last)
        for i in tl.range(tile - begin, stop - begin, num_stages=STAGES):
            t = i * BLOCK_N + token
            held = t < kept
            valid = t < tokens
            # A kept token lies in a head page, the others where their position says.
            page = first_page + t // P
            place = tail_start + t - kept
            entry = place // P
            entry += tl.where(entry < prompt_blocks, 0, compact_blocks)
            entry = tl.where(held, prompt_blocks + page // (L * Hkv), entry)
            block = tl.load(table_ptr + entry, valid, 0).to(tl.int64)
            slot = tl.where(held, t % P, place % P)
            in_layer = tl.where(held, page // Hkv % L, layer)
            in_block = tl.where(held, page % Hkv, head)
            offset = block * stride_cb + in_layer.to(tl.int64) * stride_cl
            offset += in_block * stride_ch + slot * stride_cp
            kv_ptr = cache_ptr + offset[:, None] + d[None, :]
            kv_mask = valid[:, None] & in_head[None, :]

            k = tl.load(kv_ptr, kv_mask, 0.0).to(q.dtype)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            seen = valid[None, :] & (held[None, :] | (place[None, :] <= q_position[:, None]))
            s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen nothing
            p = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m - shift)
            norm = norm * alpha + tl.sum(p, 1)
            # Transposed and back: fp8 values would else be loaded 8 bytes at a time.
            v = tl.trans(tl.trans(tl.load(kv_ptr + D, kv_mask, 0.0)).to(q.dtype))
            acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new

        if (begin >= program * share) & (end <= last):  # the whole item
            if end > begin:
                out = acc / tl.where(norm == 0, 1.0, norm)[:, None]  # padded rows have seen nothing
                if HAS_V_SCALE:
                    out *= tl.load(v_scale_ptr)
                o_offset = (first_query + q_index)[:, None] * stride_ot + q_head[
                    :, None
                ] * stride_oh
                tl.store(output_ptr + o_offset + d[None, :], out, q_mask)
        else:
            part = program * 2 + (begin >= program * share).to(tl.int32)
            part_row = part.to(tl.int64) * ROWS + m_row
            tl.store(partial_ptr + part_row[:, None] * D + d[None, :], acc, q_mask)
            tl.store(stats_ptr + part_row * 2, m, q_valid)
            tl.store(stats_ptr + part_row * 2 + 1, norm, q_valid)
        tile = stop
        item += 1


@triton.jit(do_not_specialize=["layer", "num_items"])
def _combine(
    output_ptr,
    v_scale_ptr,
    rows_ptr,
    first_tile_ptr,
    partial_ptr,
    stats_ptr,
    layer,
    num_items,
    stride_ot,
    stride_oh,
    stride_items,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0)
    first_tile_ptr += layer.to(tl.int64) * (stride_items + 1)
    begin = tl.load(first_tile_ptr + item)
    end = tl.load(first_tile_ptr + item + 1)
    share = tl.cdiv(tl.load(first_tile_ptr + num_items), PROGRAMS)
    if end == begin:
        return
    first = begin // share
    last = (end - 1) // share
    if first == last:
        return

    row_ptr = rows_ptr + 8 * (item // Hkv)
    first_query = tl.load(row_ptr + 1).to(tl.int64)
    queries = tl.load(row_ptr + 2)
    m_row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q_index = m_row // G
    q_head = item % Hkv * G + m_row % G
    q_valid = q_index < queries
    mask = q_valid[:, None] & (d < D)[None, :]

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for program in range(first, last + 1):
        # The item is the last one of its first program, and the first one of the others.
        part_row = (program * 2 + (program == first).to(tl.int32)).to(tl.int64) * ROWS + m_row
        part_m = tl.load(stats_ptr + part_row * 2, q_valid, 0.0)
        part_norm = tl.load(stats_ptr + part_row * 2 + 1, q_valid, 0.0)
        part = tl.load(partial_ptr + part_row[:, None] * D + d[None, :], mask, 0.0)
        m_new = tl.maximum(m, part_m)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, beta = tl.exp2(m - shift), tl.exp2(part_m - shift)
        norm = norm * alpha + part_norm * beta
        acc = acc * alpha[:, None] + part * beta[:, None]
        m = m_new
    out = acc / tl.where(norm == 0, 1.0, norm)[:, None]  # padded rows have seen nothing
    if HAS_V_SCALE:
        out *= tl.load(v_scale_ptr)
    offset = (first_query + q_index)[:, None] * stride_ot + q_head[:, None] * stride_oh
    tl.store(output_ptr + offset + d[None, :], out, mask)


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
    """Causal attention of the scheduled rows: head pages first, then the tail.

    Pruned rows attend per KV head to what it kept, then to the tokens from ``n - W`` on; the others
    to all of their tokens. What each program computes stands in the schedule, on the device, so a
    launch can be captured in a CUDA graph. Flash decoding with the split of `schedule_decode`:
    parts that several programs share are combined by a second kernel.

    Args:
        query: the step's queries, ``[T, Hq, D]``.
        cache: ``[L, B, Hkv, P, 2 * D]``, fp8 (e4m3) or the query's dtype.
        layer: the layer that attends.
        block_table: int32 ``[R, max_blocks]``.
        batch: its schedule has been written by `schedule_decode`.
        output: ``[T, Hq, D]``; the scheduled queries are written, nothing else is.
        scale: of the logits.
        k_scale: per-tensor scale of the cached keys, float32, one element; 1 if not given.
        v_scale: the same for values.

    Raises:
        ValueError: for shapes, strides or dtypes that do not fit together.
    """
    _, Hq, D = query.shape
    L, _, Hkv, P, width = cache.shape
    G = Hq // Hkv
    if width != 2 * D or Hq % Hkv or output.shape != query.shape:
        raise ValueError(
            f"query {list(query.shape)} [T, Hq, D], output {list(output.shape)} and cache "
            f"{list(cache.shape)} [L, B, Hkv, P, 2 * D] do not fit together"
        )
    if query.stride(2) != 1 or output.stride(2) != 1 or cache.stride(4) != 1:
        raise ValueError("the last dimension of query, output and cache must be contiguous")
    if cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a cache of {cache.dtype} beside queries of {query.dtype}")
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError("block_table must be int32 with contiguous rows")
    buffers = batch.buffers
    BLOCK_M = query_block(batch.block_q * G)
    BLOCK_D = triton.next_power_of_2(D)
    num_items = batch.query_tiles * Hkv
    has_k_scale, has_v_scale = k_scale is not None, v_scale is not None
    _sparse_decode[(buffers.programs,)](
        query,
        cache,
        block_table,
        output,
        k_scale,
        v_scale,
        buffers.rows,
        buffers.items,
        buffers.first_tile,
        buffers.first_item,
        buffers.partial,
        buffers.stats,
        layer,
        num_items,
        scale,
        *query.stride()[:2],
        *output.stride()[:2],
        *cache.stride()[:4],
        block_table.stride(0),
        buffers.items.shape[1],
        L=L,
        Hkv=Hkv,
        G=G,
        D=D,
        P=P,
        PROGRAMS=buffers.programs,
        ROWS=buffers.max_rows,
        HAS_K_SCALE=has_k_scale,
        HAS_V_SCALE=has_v_scale,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        BLOCK_M=BLOCK_M,
        BLOCK_N=buffers.block_n,
        BLOCK_D=BLOCK_D,
        **launch_options(BLOCK_M, D, query.dtype),
    )
    _combine[(num_items,)](
        output,
        v_scale,
        buffers.rows,
        buffers.first_tile,
        buffers.partial,
        buffers.stats,
        layer,
        num_items,
        *output.stride()[:2],
        buffers.items.shape[1],
        Hkv=Hkv,
        G=G,
        D=D,
        PROGRAMS=buffers.programs,
        ROWS=buffers.max_rows,
        HAS_V_SCALE=has_v_scale,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        num_warps=8 if BLOCK_M > 32 else 4,
        maxnreg=255,
    )
