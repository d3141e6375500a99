"""Where each head page of a request begins, computed once, when its prompt is pruned."""

import torch
import triton
import triton.language as tl

from . import tables
from .batch import HeadPages, Prompts
from .cache import cache_units

# Per head page 4 bytes read, 4 written: a launch of a few microseconds, once a prompt.
BLOCK_PAGES = 1024


@triton.jit(do_not_specialize=["stride_prompts"])
def _list_pages(
    page_units_ptr,
    block_table_ptr,
    compact_blocks_ptr,
    prompts_ptr,
    max_pages,
    stride_cl,
    stride_cb,
    stride_ch,
    stride_table,
    stride_prompts,
    L: tl.constexpr,
    Hkv: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    BATCH_ROW: tl.constexpr = tables.BATCH_ROW,
    REQUEST: tl.constexpr = tables.REQUEST,
    TOKENS: tl.constexpr = tables.TOKENS,
):
    prompt = tl.program_id(0)
    request = tl.load(prompts_ptr + REQUEST * stride_prompts + prompt).to(tl.int64)
    pages = tl.load(compact_blocks_ptr + request) * (L * Hkv)
    if tl.program_id(1) * BLOCK >= pages:
        return
    row = tl.load(prompts_ptr + BATCH_ROW * stride_prompts + prompt).to(tl.int64)
    prompt_blocks = tl.cdiv(tl.load(prompts_ptr + TOKENS * stride_prompts + prompt), P)
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = page < tl.minimum(pages, max_pages)
    entry = prompt_blocks + page // (L * Hkv)
    block = tl.load(block_table_ptr + row * stride_table + entry, there, 0)
    in_layer, head = page // Hkv % L, page % Hkv
    unit = block * stride_cb + in_layer * stride_cl + head * stride_ch
    tl.store(page_units_ptr + request * max_pages + page, unit, there)


def list_pages(
    cache: torch.Tensor, block_table: torch.Tensor, prompts: Prompts, pages: HeadPages
) -> None:
    """Write the head pages' places for `sparse_decode`, which else computes them in every step.

    Args:
        cache: keys and values, ``[L, B, Hkv, P, 2 * D]``; only its strides count.
        block_table: block numbers of each row, int32 ``[R, max_blocks]``.
        prompts: prompts that this step prunes; their compact blocks are in the table.
        pages: head pages of all requests; rows of `page_units` are written, as many numbers as
            the compact blocks have pages.

    Raises:
        ValueError: if `pages` has no `page_units`.
    """
    if pages.page_units is None:
        raise ValueError("the head pages were allocated without page_units")
    L, _, Hkv, P, _ = cache.shape
    max_pages = pages.page_units.shape[1]
    _list_pages[(prompts.count, triton.cdiv(max_pages, BLOCK_PAGES))](
        pages.page_units,
        block_table,
        pages.compact_blocks,
        prompts.table,
        max_pages,
        *cache_units(cache)[:3],
        block_table.stride(0),
        prompts.table.stride(0),
        L=L,
        Hkv=Hkv,
        P=P,
        BLOCK=BLOCK_PAGES,
    )
