"""Score every prompt token by the attention that the observation window pays to it.

Of one layer, with `e` bytes an element of the cache, must move ``Hkv * n * D * e`` bytes (the keys;
once more if they do not stay in the L2 cache, since the softmax needs its sum before a weight is
known) and 8 bytes for each of ``Hkv * (n - W)`` sums and scores; the two products take
``4 * W * Hq * n * D`` operations. Storing the logits between them would move
``8 * W * Hq * n`` bytes, more than the keys as soon as ``4 * W * G > D``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import tables
from .batch import Prompts, PruneWorkspace
from .tile_sizes import query_block

LOG2_E = 1.4426950408889634
POOL_BLOCK = 1024
MAX_PARTS = 64


class Tiles(NamedTuple):
    """Query rows and tokens of a tile, warps, and stages of the loop over tokens."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles(rows: int, D: int, dtype: torch.dtype) -> Tiles:
    """Tiles for `rows` window queries of a KV head, `G * W`, and queries of `dtype`."""
    block_m = query_block(rows)
    if dtype == torch.float32:  # no tensor cores: registers hold the operands
        return Tiles(16, 16, 4, 3)
    return Tiles(block_m, 128 if D <= 128 else 64, 4, 3)


def part_count(tokens: int, block_n: int, rows: int) -> int:
    """Parts that a prompt of `tokens` is cut into if `rows` tiles of queries scan it."""
    return max(1, min(PruneWorkspace.PARTS // rows, MAX_PARTS, triton.cdiv(tokens, block_n)))


@triton.jit
def _load_queries(
    query_ptr,
    stride_qt,
    stride_qh,
    end,
    head,
    block,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tile `block` of a KV head's window queries; row ``g * W + w`` is query `w` of head `g`."""
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = (end - W + m % W).to(tl.int64)
    query_head = (head * G + m // W).to(tl.int64)
    rows = query_ptr + token * stride_qt + query_head * stride_qh
    valid = (m < G * W)[:, None] & (d < D)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=valid, other=0.0)


@triton.jit
def _load_keys(
    cache_ptr,
    stride_cb,
    stride_ch,
    stride_cp,
    row_ptr,
    head,
    position,
    n,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys at `position`, zeros from `n` on."""
    d = tl.arange(0, BLOCK_D)
    held = position < n
    block = tl.load(row_ptr + position // P, mask=held, other=0).to(tl.int64)
    token = block * stride_cb + (position % P).to(tl.int64) * stride_cp
    keys = cache_ptr + head.to(tl.int64) * stride_ch + token
    return tl.load(keys[:, None] + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["parts"])
def _window_stats(
    query_ptr,
    cache_ptr,
    block_table_ptr,
    prompts_ptr,
    stats_ptr,
    k_scale_ptr,
    scale,
    parts,
    stride_qt,
    stride_qh,
    stride_cb,
    stride_ch,
    stride_cp,
    stride_tr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    BATCH_ROW: tl.constexpr = tables.BATCH_ROW,
    QUERY_END: tl.constexpr = tables.QUERY_END,
    TOKENS: tl.constexpr = tables.TOKENS,
):
    """Base-2 logarithm of each window query's softmax sum over one part of its prompt."""
    prompt, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    R = tl.num_programs(0)
    head, block = tile // QUERY_BLOCKS, tile % QUERY_BLOCKS
    row = tl.load(prompts_ptr + BATCH_ROW * R + prompt).to(tl.int64)
    row_ptr = block_table_ptr + row * stride_tr
    end = tl.load(prompts_ptr + QUERY_END * R + prompt)
    n = tl.load(prompts_ptr + TOKENS * R + prompt)
    if HAS_K_SCALE:
        scale *= tl.load(k_scale_ptr)

    query = _load_queries(
        query_ptr, stride_qt, stride_qh, end, head, block, G, D, W, BLOCK_M, BLOCK_D
    )
    m = tl.arange(0, BLOCK_M)
    last = n - W + (block * BLOCK_M + m) % W  # position of each row's query
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    share = tl.cdiv(tl.cdiv(n, BLOCK_N), parts) * BLOCK_N
    for start in tl.range(
        part * share, tl.minimum(part * share + share, n), BLOCK_N, num_stages=NUM_STAGES
    ):
        position = start + tl.arange(0, BLOCK_N)
        keys = _load_keys(
            cache_ptr, stride_cb, stride_ch, stride_cp, row_ptr, head, position, n, P, D, BLOCK_D
        ).to(query.dtype)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(position[None, :] <= last[:, None], logits, -float("inf"))
        new = tl.maximum(maximum, tl.max(logits, 1))
        base = tl.where(new == -float("inf"), 0.0, new)  # a row that sees none of these tokens
        total = total * tl.exp2(maximum - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        maximum = new

    log_sum = maximum + tl.log2(tl.where(total > 0, total, 1.0))  # -inf if nothing was seen
    first = ((prompt * tl.num_programs(1) + tile) * parts + part) * BLOCK_M
    tl.store(stats_ptr + first + m, log_sum)


@triton.jit(do_not_specialize=["parts"])
def _window_sums(
    query_ptr,
    cache_ptr,
    block_table_ptr,
    prompts_ptr,
    stats_ptr,
    sums_ptr,
    k_scale_ptr,
    scale,
    parts,
    capacity,
    stride_qt,
    stride_qh,
    stride_cb,
    stride_ch,
    stride_cp,
    stride_tr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    BATCH_ROW: tl.constexpr = tables.BATCH_ROW,
    QUERY_END: tl.constexpr = tables.QUERY_END,
    TOKENS: tl.constexpr = tables.TOKENS,
    OFFSET: tl.constexpr = tables.OFFSET,
):
    """Mean weight of each token of a tile over the window queries of a KV head."""
    prompt, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    R, Hkv = tl.num_programs(0), tl.num_programs(1)
    n = tl.load(prompts_ptr + TOKENS * R + prompt)
    if tile * BLOCK_N >= n - W:
        return
    row = tl.load(prompts_ptr + BATCH_ROW * R + prompt).to(tl.int64)
    row_ptr = block_table_ptr + row * stride_tr
    end = tl.load(prompts_ptr + QUERY_END * R + prompt)
    offset = tl.multiple_of(tl.load(prompts_ptr + OFFSET * R + prompt), 16)
    if HAS_K_SCALE:
        scale *= tl.load(k_scale_ptr)

    position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = _load_keys(
        cache_ptr, stride_cb, stride_ch, stride_cp, row_ptr, head, position, n - W, P, D, BLOCK_D
    )
    m = tl.arange(0, BLOCK_M)
    weights = tl.zeros([BLOCK_N], tl.float32)
    for block in tl.range(QUERY_BLOCKS, num_stages=2):
        query = _load_queries(
            query_ptr, stride_qt, stride_qh, end, head, block, G, D, W, BLOCK_M, BLOCK_D
        )
        # Every query sees the first token, so that the first part's logarithms are finite.
        own_ptr = stats_ptr + ((prompt * Hkv + head) * QUERY_BLOCKS + block) * parts * BLOCK_M
        maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, parts, BLOCK_PARTS):
            part = first + tl.arange(0, BLOCK_PARTS)
            log_sums = tl.load(
                own_ptr + part[:, None] * BLOCK_M + m[None, :],
                mask=(part < parts)[:, None],
                other=-float("inf"),
            )
            new = tl.maximum(maximum, tl.max(log_sums, 0))
            total = total * tl.exp2(maximum - new) + tl.sum(tl.exp2(log_sums - new[None, :]), 0)
            maximum = new
        # Rows past the last query get no weight.
        log_sum = tl.where(block * BLOCK_M + m < G * W, maximum + tl.log2(total), float("inf"))

        logits = tl.dot(keys.to(query.dtype), tl.trans(query), input_precision="ieee") * scale
        weights += tl.sum(tl.exp2(logits - log_sum[None, :]), 1)

    sums = sums_ptr + head.to(tl.int64) * capacity + offset + position
    tl.store(sums, weights / (G * W), mask=position < n - W)


@triton.jit
def _pool(
    prompts_ptr,
    sums_ptr,
    scores_ptr,
    capacity,
    W: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr = tables.TOKENS,
    OFFSET: tl.constexpr = tables.OFFSET,
):
    """Average over `KERNEL_SIZE` neighbours, zeros beyond both ends."""
    prompt, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    R = tl.num_programs(0)
    size = tl.load(prompts_ptr + TOKENS * R + prompt) - W
    if tile * BLOCK >= size:
        return
    offset = tl.multiple_of(tl.load(prompts_ptr + OFFSET * R + prompt), 16)
    first = head.to(tl.int64) * capacity + offset
    position = tile * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(KERNEL_SIZE):
        source = position + i - KERNEL_SIZE // 2
        total += tl.load(sums_ptr + first + source, mask=(source >= 0) & (source < size), other=0.0)
    tl.store(scores_ptr + first + position, total / KERNEL_SIZE, mask=position < size)


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
    """Score the prompt tokens older than the observation window, per KV head.

    The causal attention of a prompt's last `W` queries over the whole prompt, averaged over these
    queries and over the query heads of each group, then average-pooled over positions (zeros beyond
    both ends count). float32 but for the products' inputs. Source: SnapKV,
    https://arxiv.org/abs/2404.14469, with the mean pooling of SparseMM.

    Args:
        query: queries of the step's tokens, position-encoded, ``[T, Hq, D]``; the last dimension
            contiguous. float32, float16 or bfloat16.
        layer_cache: one layer of the cache, ``[B, Hkv, P, 2 * D]``; the last dimension contiguous.
            The query's dtype, or float8_e4m3fn (compute capability 8.9 at least).
        block_table: block numbers of each row, int32 ``[rows, max_blocks]``, rows contiguous.
        prompts: prompts to score, of at least `window` tokens each; offsets are multiples of 16.
        workspace: workspace; columns ``[offset, offset + n - W)`` of `scores` are written, `sums`
            and `stats` are overwritten.
        window: tokens of the observation window, `W`, 64 at most.
        kernel_size: width of the pooling in tokens, odd.
        scale: factor of the logits.
        k_scale: factor of the keys, float32, one element.

    Raises:
        ValueError: for shapes, strides, dtypes or sizes other than these.
    """
    _check(query, layer_cache, block_table, prompts, workspace, window, kernel_size, k_scale)
    _, Hq, D = query.shape
    _, Hkv, P, _ = layer_cache.shape
    G, R = Hq // Hkv, prompts.count
    block_m, block_n, num_warps, num_stages = tiles(G * window, D, query.dtype)
    query_blocks = triton.cdiv(G * window, block_m)
    parts = part_count(prompts.max_tokens, block_n, R * Hkv * query_blocks)
    strides = (*query.stride()[:2], *layer_cache.stride()[:3], block_table.stride(0))
    sizes = {
        "G": G,
        "D": D,
        "W": window,
        "P": P,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "QUERY_BLOCKS": query_blocks,
        "HAS_K_SCALE": k_scale is not None,
        "num_warps": num_warps,
    }
    scale *= LOG2_E
    inputs = query, layer_cache, block_table, prompts.table, workspace.stats
    _window_stats[(R, Hkv * query_blocks, parts)](
        *inputs, k_scale, scale, parts, *strides, NUM_STAGES=num_stages, **sizes
    )
    _window_sums[(R, Hkv, triton.cdiv(prompts.max_tokens, block_n))](
        *inputs,
        workspace.sums,
        k_scale,
        scale,
        parts,
        workspace.capacity,
        *strides,
        BLOCK_PARTS=16,
        **sizes,
    )
    _pool[(R, Hkv, triton.cdiv(prompts.max_tokens, POOL_BLOCK))](
        prompts.table,
        workspace.sums,
        workspace.scores,
        workspace.capacity,
        W=window,
        KERNEL_SIZE=kernel_size,
        BLOCK=POOL_BLOCK,
    )


def _check(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    block_table: torch.Tensor,
    prompts: Prompts,
    workspace: PruneWorkspace,
    window: int,
    kernel_size: int,
    k_scale: torch.Tensor | None,
) -> None:
    if query.dim() != 3 or query.stride(2) != 1:
        raise ValueError(f"query {list(query.shape)} must be [T, Hq, D], contiguous in D")
    T, Hq, D = query.shape
    if layer_cache.dim() != 4 or layer_cache.shape[3] != 2 * D or layer_cache.stride(3) != 1:
        raise ValueError(
            f"layer_cache {list(layer_cache.shape)} must be [B, Hkv, P, 2 * D] with D {D}, "
            "contiguous in the last dimension"
        )
    Hkv = layer_cache.shape[1]
    if Hq % Hkv:
        raise ValueError(f"Hq {Hq} must be a multiple of Hkv {Hkv}")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"query is {query.dtype}; it must be float32, float16 or bfloat16")
    if layer_cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"layer_cache is {layer_cache.dtype}; it must be {query.dtype}, as the query, or "
            "float8_e4m3fn"
        )
    if block_table.dim() != 2 or block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table {list(block_table.shape)} {block_table.dtype} must be int32 "
            "[rows, max_blocks], contiguous in the last dimension"
        )
    if not 1 <= window <= 64 or window > min(T, prompts.max_tokens):
        raise ValueError(
            f"window is {window}; it must lie in [1, 64] and not exceed the step's {T} queries or "
            f"the longest prompt, {prompts.max_tokens} tokens"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd and positive")
    prompts.check()
    workspace.check(prompts, Hkv)
    if k_scale is not None and (k_scale.numel() != 1 or k_scale.dtype != torch.float32):
        raise ValueError(f"k_scale {list(k_scale.shape)} must be one float32 element")
