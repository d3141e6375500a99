"""Places of head pages, against where the pages really begin, and against the torch twin."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, Paged

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts
from sparsemm_vllm.triton_kernels.list_pages import BLOCK_PAGES, list_pages

D, UNTOUCHED = 16, -7


def listed(
    op: Any, cache: torch.Tensor, table: torch.Tensor, prompts: list[int], C: list[int], most: int
) -> torch.Tensor:
    """`page_units` of requests 2, 1, 0..., which are rows 0, 1, 2... of the batch."""
    R = len(prompts)
    pages = HeadPages.empty(R + 1, cache.shape[0], cache.shape[2], DEVICE, max_pages=most)
    assert pages.page_units is not None
    pages.page_units.fill_(UNTOUCHED)
    pages.compact_blocks.copy_(torch.tensor([*reversed(C), 5]))
    rows = [(row, R - 1 - row, 0, n) for row, n in enumerate(prompts)]
    op(cache, table, Prompts.pack(rows, 0, DEVICE), pages)
    return pages.page_units


@pytest.mark.parametrize("op", [list_pages, torch_ops.list_pages], ids=["triton", "torch"])
@pytest.mark.parametrize(
    ("L", "Hkv", "P", "C"),
    [
        (2, 3, 8, [3, 1, 2]),  # heads and layers in numbers that are no powers of two
        (4, 4, 16, [1, 5, 1]),
        (1, 1, 8, [2, 2, 4]),
        (8, 16, 8, [9, 1, 17]),  # more pages than a program lists
    ],
)
def test_places(op: Any, L: int, Hkv: int, P: int, C: list[int]) -> None:
    prompts = [5 * P, 3 * P + 1, P - 1]  # that end a page, begin one, and do not fill one
    N = [5, 4, 1]
    paged = Paged.random([n + c for n, c in zip(N, C, strict=True)], L, Hkv, P, D)
    most = max(C) * L * Hkv + 3
    units = listed(op, paged.cache, paged.block_table, prompts, C, most).cpu()
    assert most > BLOCK_PAGES or L < 8
    for row, (first, count) in enumerate(zip(N, C, strict=True)):
        own = units[len(prompts) - 1 - row]
        for page in range(count * L * Hkv):
            block = int(paged.block_table[row, first + page // (L * Hkv)])
            place = paged.cache[page // Hkv % L, block, page % Hkv]
            begin = place.storage_offset() - paged.cache.storage_offset()
            assert own[page] * 2 * D == begin, (row, page)
        assert (own[count * L * Hkv :] == UNTOUCHED).all()
    assert (units[-1] == UNTOUCHED).all(), "a request that is not pruned in this step"


def test_no_more_than_there_is_room_for() -> None:
    """Compact blocks are the most that any rank needs: this one's list may be shorter."""
    paged = Paged.random([9], 2, 2, 8, D)
    units = listed(list_pages, paged.cache, paged.block_table, [40], [4], most=5)
    assert (units[0] != UNTOUCHED).all()
    assert (units[1] == UNTOUCHED).all()


def test_without_a_list() -> None:
    paged = Paged.random([9], 2, 2, 8, D)
    pages = replace(HeadPages.empty(1, 2, 2, DEVICE), page_units=None)
    with pytest.raises(ValueError, match="without page_units"):
        list_pages(paged.cache, paged.block_table, Prompts.pack([(0, 0, 0, 40)], 0, DEVICE), pages)
