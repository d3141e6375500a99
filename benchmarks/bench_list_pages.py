"""Places of head pages, once for each prompt that is pruned: a variant of the decode kernel's."""

from typing import Any

import pytest
import torch
from common import DEVICE, GPU, timed

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts
from sparsemm_vllm.triton_kernels.list_pages import list_pages

P, D = 16, 128


# Prompts, layers, KV heads, compact blocks: Vicuna-7B with budgets of 256 and 1,024 tokens.
@pytest.mark.parametrize(
    "case", [(1, 32, 32, 17), (8, 32, 32, 65)] if GPU else [(2, 4, 4, 5)], ids=str
)
def bench_list_pages(benchmark: Any, case: tuple[int, ...]) -> None:
    R, L, Hkv, C = case
    n = 8192 if GPU else 100
    pages = HeadPages.empty(R, L, Hkv, DEVICE, max_pages=C * L * Hkv)
    pages.compact_blocks.fill_(C)
    table = torch.ones(R, -(-n // P) + C, dtype=torch.int32, device=DEVICE)
    cache = torch.empty(L, 2, Hkv, P, 2 * D, dtype=torch.bfloat16, device=DEVICE)
    prompts = Prompts.pack([(i, i, 0, n) for i in range(R)], 0, DEVICE)
    op = list_pages if GPU else torch_ops.list_pages
    timed(benchmark, lambda: op(cache, table, prompts, pages), bytes=R * C * L * Hkv * 8)
