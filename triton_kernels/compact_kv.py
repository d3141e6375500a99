"""Kept tokens, copied from the prompt's blocks to the head pages."""

import torch
import triton
import triton.language as tl

from .batch import HeadPages, Prompts, PruneWorkspace
from .tables import BATCH_ROW, OFFSET, REQUEST, TOKENS

# Moved per kept token of a head: 2 * D elements read and as many written, 4 bytes of its position
# and 4 of its block; no arithmetic but addresses.

_TILE_BYTES = 16384  # eight 16-byte loads for each of 128 threads


def tiles(D: int, element_size: int) -> dict[str, int]:
    """Launch options for heads of `D` elements of `element_size` bytes."""
    block_d = triton.next_power_of_2(2 * D)
    block_t = max(1, min(128, _TILE_BYTES // (block_d * element_size)))
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": 4}


@triton.jit(
    do_not_specialize_on_alignment=[
        "lengths_ptr",
        "first_pages_ptr",
        "row_ptr",
        "request_ptr",
        "tokens_ptr",
        "offset_ptr",
    ]
)
def _compact_kv_kernel(
    cache_ptr,
    source_ptr,
    table_ptr,
    positions_ptr,
    lengths_ptr,
    first_pages_ptr,
    row_ptr,
    request_ptr,
    tokens_ptr,
    offset_ptr,
    stride_cl,
    stride_cb,
    stride_ch,
    stride_cp,
    stride_tr,
    stride_ph,
    stride_lr,
    stride_lh,
    stride_fr,
    stride_fh,
    L: tl.constexpr,
    Hkv: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, prompt = tl.program_id(1).to(tl.int64), tl.program_id(2)
    request = tl.load(request_ptr + prompt).to(tl.int64)
    length = tl.load(lengths_ptr + request * stride_lr + head * stride_lh)
    if tl.program_id(0) * BLOCK_T >= length:
        return
    first_page = tl.load(first_pages_ptr + request * stride_fr + head * stride_fh)
    prompt_blocks = tl.cdiv(tl.load(tokens_ptr + prompt), P)
    table_ptr += tl.load(row_ptr + prompt).to(tl.int64) * stride_tr
    offset = tl.multiple_of(tl.load(offset_ptr + prompt), 16)

    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    held = token < length
    position = tl.load(positions_ptr + head * stride_ph + offset + token, mask=held, other=0)
    block = tl.load(table_ptr + position // P, mask=held, other=0).to(tl.int64)
    source = block * stride_cb + head * stride_ch + (position % P).to(tl.int64) * stride_cp

    page = first_page + token // P
    block = tl.load(table_ptr + prompt_blocks + page // (L * Hkv), mask=held, other=0).to(tl.int64)
    target = block * stride_cb + (page // Hkv % L).to(tl.int64) * stride_cl
    target += (page % Hkv).to(tl.int64) * stride_ch + (token % P).to(tl.int64) * stride_cp

    column = tl.arange(0, BLOCK_D)[None]
    mask = held[:, None] & (column < 2 * D)
    kv = tl.load(source_ptr + source[:, None] + column, mask=mask)
    tl.store(cache_ptr + target[:, None] + column, kv, mask=mask)


def compact_kv(
    cache: torch.Tensor,
    layer: int,
    block_table: torch.Tensor,
    prompts: Prompts,
    workspace: PruneWorkspace,
    pages: HeadPages,
) -> None:
    """Copy each head's kept tokens of one layer to its head pages, bytes as they are.

    Args:
        cache: keys and values, ``[L, B, Hkv, P, 2 * D]``, elements of 1, 2 or 4 bytes, the last
            dimension contiguous; head pages are written, their slots past a head's length are not.
        layer: layer whose tokens are copied.
        block_table: block numbers of each row, int32 ``[R', max_blocks]``, rows contiguous.
        prompts: prompts of this launch.
        workspace: workspace with the kept positions, from `select_tokens`.
        pages: head pages of all requests: lengths in tokens, and first pages.

    Raises:
        ValueError: for tensors of another shape, layout or type, and a layer that does not exist.
    """
    if cache.ndim != 5 or cache.stride(4) != 1 or cache.element_size() not in (1, 2, 4):
        raise ValueError(
            f"cache is {cache.dtype} {list(cache.shape)}, stride {cache.stride()}; "
            "[L, B, Hkv, P, 2 * D] of 1, 2 or 4 bytes with contiguous last dimension wanted"
        )
    L, _, Hkv, P, columns = cache.shape
    if not 0 <= layer < L:
        raise ValueError(f"layer is {layer}; the cache has {L}")
    if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table is {block_table.dtype} {list(block_table.shape)}, "
            f"stride {block_table.stride()}; int32 [R', max_blocks] with contiguous rows wanted"
        )
    positions = workspace.positions
    if positions.dtype != torch.int32 or len(positions) != Hkv or positions.stride(1) != 1:
        raise ValueError(
            f"positions are {positions.dtype} {list(positions.shape)}, "
            f"stride {positions.stride()}; int32 [Hkv = {Hkv}, capacity] rows wanted"
        )
    for name, tensor in (("lengths", pages.lengths), ("first_pages", pages.first_pages)):
        if tensor.dtype != torch.int32 or tensor.shape[1:] != (L, Hkv):
            raise ValueError(
                f"{name} are {tensor.dtype} {list(tensor.shape)}; "
                f"int32 [max_requests, L = {L}, Hkv = {Hkv}] wanted"
            )
    # Integers of the same size: no conversion touches a NaN.
    raw = cache.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.element_size()])
    lengths, first_pages = pages.lengths[:, layer], pages.first_pages[:, layer]
    table = prompts.table
    options = tiles(columns // 2, cache.element_size())
    grid = (triton.cdiv(prompts.max_kept, options["BLOCK_T"]), Hkv, prompts.count)
    _compact_kv_kernel[grid](
        raw,
        raw[layer],
        block_table,
        positions,
        lengths,
        first_pages,
        table[BATCH_ROW],
        table[REQUEST],
        table[TOKENS],
        table[OFFSET],
        *raw.stride()[:4],
        block_table.stride(0),
        positions.stride(0),
        *lengths.stride(),
        *first_pages.stride(),
        L,
        Hkv,
        P,
        columns // 2,
        **options,
    )
