"""Cache slots of generated tokens, moved behind the compact blocks."""

import torch
import triton
import triton.language as tl

from .batch import HeadPages, Rows

# Moved per token of a decode row: 16 bytes of position and slot, 4 of its block; per row about 40.
# A launch of a few programs: its time is the launch's.

BLOCK = 128  # queries; most rows have one


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _correct_slots_kernel(
    slots_ptr,
    positions_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    requests_ptr,
    prompt_tokens_ptr,
    compact_blocks_ptr,
    stride_tr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    request = tl.load(requests_ptr + row).to(tl.int64)
    n = tl.load(prompt_tokens_ptr + request)
    compact_blocks = tl.load(compact_blocks_ptr + request)
    first = tl.load(query_start_ptr + row)
    end = tl.load(query_start_ptr + row + 1)
    computed = tl.load(seq_lens_ptr + row) - (end - first)
    if (compact_blocks > 0) & (computed >= n):
        token = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        own = token < end
        position = tl.load(positions_ptr + token, mask=own, other=0)
        entry = position // P
        entry = tl.where(entry < tl.cdiv(n, P), entry, entry + compact_blocks)
        block = tl.load(table_ptr + row * stride_tr + entry, mask=own, other=0).to(tl.int64)
        tl.store(slots_ptr + token, block * P + position % P, mask=own)


def correct_slots(
    slots: torch.Tensor,
    positions: torch.Tensor,
    rows: Rows,
    pages: HeadPages,
    page_size: int,
    max_query_len: int,
) -> None:
    """Move the slots of tokens behind a pruned prompt, in place.

    vLLM maps the token at position `p` to entry ``p // P`` of its row; behind a pruned prompt of
    `N` blocks, entries from `N` on lie `C` further. A row is corrected if its request is pruned and
    all `n` prompt tokens were computed before the step. Every other slot, padding included, stays.

    Args:
        slots: cache slot of each token of the step, int64 ``[T]``, contiguous.
        positions: position of each token in its request, int64 ``[T]``, contiguous.
        rows: rows of the step's batch; those of requests are corrected.
        pages: head pages of all requests; prompt tokens and compact blocks are read.
        page_size: tokens of a page, `P`.
        max_query_len: tokens of a row in this step, at most.

    Raises:
        ValueError: for tensors of another shape, layout or type.
    """
    block_table, R = rows.block_table, len(rows.requests)
    for name, tensor, kinds, size in (
        ("slots", slots, (torch.int64,), 0),
        ("positions", positions, (torch.int64,), 0),
        ("query_start", rows.query_start, (torch.int32,), R + 1),
        ("seq_lens", rows.seq_lens, (torch.int32,), R),
        ("requests", rows.requests, (torch.int32, torch.int64), 0),
    ):
        if tensor.dtype not in kinds or tensor.ndim != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, stride {tensor.stride()}; "
                f"a contiguous vector of {' or '.join(map(str, kinds))} wanted"
            )
        if len(tensor) < size:
            raise ValueError(f"{name} has {len(tensor)} elements; {size} wanted at least")
    if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table is {block_table.dtype} {list(block_table.shape)}, "
            f"stride {block_table.stride()}; int32 [R', max_blocks] with contiguous rows wanted"
        )
    _correct_slots_kernel[(R, triton.cdiv(max_query_len, BLOCK))](
        slots,
        positions,
        block_table,
        rows.query_start,
        rows.seq_lens,
        rows.requests,
        pages.prompt_tokens,
        pages.compact_blocks,
        block_table.stride(0),
        page_size,
        BLOCK=BLOCK,
        num_warps=1,
    )
