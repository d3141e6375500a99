"""The key that each recorded query attends to most: what head profiles are made of.

Reads the keys of a request once for each of its query tiles, ``Hkv * n * D`` elements, and computes
``2 * D * Hq * n`` FLOP a query. No softmax: it changes no order, nor does a positive scale.
"""

import torch
import triton
import triton.language as tl

from . import tables
from .batch import QueryTiles
from .tile_sizes import decode_tokens, query_block


@triton.jit
def _top_keys(
    query_ptr,
    cache_ptr,
    block_table_ptr,
    tiles_ptr,
    output_ptr,
    stride_qt,
    stride_qh,
    stride_cb,
    stride_ch,
    stride_cp,
    stride_table,
    stride_o,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET_COLUMNS: tl.constexpr = tables.TARGET_COLUMNS,
    TILE_ROW: tl.constexpr = tables.TILE_ROW,
    FIRST_QUERY: tl.constexpr = tables.FIRST_QUERY,
    QUERIES: tl.constexpr = tables.QUERIES,
    POSITION: tl.constexpr = tables.POSITION,
    TARGET: tl.constexpr = tables.TARGET,
):
    """Query tile `program_id(0)` of KV head `program_id(1)`."""
    tile_ptr = tiles_ptr + TARGET_COLUMNS * tl.program_id(0)
    head = tl.program_id(1)
    table_ptr = block_table_ptr + tl.load(tile_ptr + TILE_ROW).to(tl.int64) * stride_table
    first_query = tl.load(tile_ptr + FIRST_QUERY).to(tl.int64)
    queries = tl.load(tile_ptr + QUERIES)
    position = tl.load(tile_ptr + POSITION)
    target = tl.load(tile_ptr + TARGET).to(tl.int64)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    index = m // G
    query_head = head * G + m % G
    valid = index < queries
    offset = (first_query + index)[:, None] * stride_qt + query_head[:, None] * stride_qh
    in_head = (d < D)[None, :]
    query = tl.load(query_ptr + offset + d[None, :], valid[:, None] & in_head, 0.0)

    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    top = tl.zeros([BLOCK_M], tl.int32)
    end = position + queries
    for start in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_N)
        held = token < end
        block = tl.load(table_ptr + token // P, held, 0).to(tl.int64)
        place = block * stride_cb + head * stride_ch + (token % P) * stride_cp
        keys = tl.load(cache_ptr + place[:, None] + d[None, :], held[:, None] & in_head, 0.0)
        logits = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision=PRECISION)
        logits = tl.where(token[None, :] <= (position + index)[:, None], logits, -float("inf"))
        largest = tl.max(logits, 1)
        where = tl.min(tl.where(logits == largest[:, None], token[None, :], end), 1)
        top = tl.where(largest > best, where, top)  # an equal one further back does not count
        best = tl.maximum(largest, best)
    tl.store(output_ptr + (target + index) * stride_o + query_head, top, valid)


def top_keys(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: QueryTiles,
    output: torch.Tensor,
) -> None:
    """Positions of the keys with the largest logits, of the queries of `tiles` and all heads.

    A query at position `i` sees the keys at ``j <= i``; the lowest `j` of equal logits counts.
    Scales of the logits and of an fp8 cache are positive and need not be known. Source of what is
    recorded: SparseMM (ICCV 2025), section 3.

    Args:
        query: queries of the step, ``[T, Hq, D]``, position-encoded; heads contiguous.
        layer_cache: cache of one layer, not pruned, ``[B, Hkv, P, 2 * D]``, fp8 (e4m3) or the
            query's dtype; the last dimension contiguous.
        block_table: block numbers of each row, int32 ``[R, max_blocks]``, rows contiguous.
        tiles: tiles of recorded queries, and their rows of the output.
        output: positions of the keys, int32 ``[rows, Hq]``, rows contiguous; only those
            that `tiles` names are written.

    Raises:
        ValueError: for shapes, strides or dtypes that do not fit together.
    """
    _, Hq, D = query.shape
    _, Hkv, P, width = layer_cache.shape
    G = Hq // Hkv
    if width != 2 * D or Hq % Hkv:
        raise ValueError(
            f"query {list(query.shape)} [T, Hq, D] and layer_cache {list(layer_cache.shape)} "
            "[B, Hkv, P, 2 * D] do not fit together"
        )
    if query.stride(2) != 1 or layer_cache.stride(3) != 1:
        raise ValueError("the last dimension of query and layer_cache must be contiguous")
    if layer_cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a cache of {layer_cache.dtype} beside queries of {query.dtype}")
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError("block_table must be int32 with contiguous rows")
    if output.dtype != torch.int32 or output.shape[1] != Hq or output.stride(1) != 1:
        raise ValueError(
            f"output is {output.dtype} {list(output.shape)}; int32 [rows, Hq = {Hq}] with "
            "contiguous rows wanted"
        )
    _top_keys[(tiles.count, Hkv)](
        query,
        layer_cache,
        block_table,
        tiles.table,
        output,
        *query.stride()[:2],
        *layer_cache.stride()[:3],
        block_table.stride(0),
        output.stride(0),
        G=G,
        D=D,
        P=P,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        BLOCK_M=query_block(tiles.block_q * G),
        BLOCK_N=decode_tokens(D, layer_cache.dtype),
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        STAGES=2 if query.dtype == torch.float32 else 3,
        num_warps=8 if query.dtype == torch.float32 else 4,
    )
