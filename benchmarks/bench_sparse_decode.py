"""One layer's decode attention over pruned prompts; on the CPU the torch twin at small sizes."""

from typing import Any

import pytest
import torch
from common import DEVICE, GPU, timed

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Rows
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.sparse_decode import sparse_decode

P, WINDOW, D = 16, 32, 128
PROGRAMS = 2 * torch.cuda.get_device_properties(0).multi_processor_count if GPU else 4

# Requests, prompt tokens, KV heads, query heads of each; Vicuna-7B's and Qwen2-VL-7B's heads.
CASES = (
    [(1, 8192, 32, 1), (8, 8192, 32, 1), (32, 8192, 32, 1), (32, 8192, 4, 7)]
    if GPU
    else [(2, 512, 4, 1), (2, 512, 2, 7)]
)


def kept_tokens(n: int, Hkv: int, budget: int) -> torch.Tensor:
    """Tokens in head pages ``[Hkv]``, as unequal as the published budgets, `budget` on average."""
    share = (torch.arange(Hkv) + 1.0) ** -1.5
    tokens = 0.1 * budget + 0.9 * budget * Hkv * share / share.sum()
    return tokens.round().long().clamp(max=n - WINDOW)


class Step:
    """A decode step of pruned requests, one layer, scheduled."""

    def __init__(self, R: int, n: int, Hkv: int, G: int, budget: int | None) -> None:
        lengths = kept_tokens(n, Hkv, budget) if budget else torch.zeros(Hkv, dtype=torch.long)
        pages = -(-lengths // P)
        self.C = -(-int(pages.sum()) // Hkv)
        N = -(-n // P)
        # Only what is attended to exists: the tail of a pruned prompt, all of another.
        freed = (n - WINDOW) // P if budget else 0
        own = N - freed + self.C + 1
        order = torch.randperm(R * own) + 1
        table = torch.zeros(R, N + self.C + 1, dtype=torch.int32)
        table[:, freed:] = order.reshape(R, own).int()
        self.table = table.to(DEVICE)
        dtype = torch.bfloat16 if GPU else torch.float32
        self.cache = torch.randn(1, R * own + 1, P, Hkv, 2 * D, device=DEVICE).to(dtype)
        self.cache = self.cache.transpose(2, 3)
        self.query = torch.randn(R, Hkv * G, D, device=DEVICE).to(dtype)
        self.output = torch.empty_like(self.query)
        self.pages = HeadPages.empty(R, 1, Hkv, DEVICE)
        self.pages.prompt_tokens.fill_(n)
        self.pages.compact_blocks.fill_(self.C)
        self.pages.lengths[:] = lengths.int().to(DEVICE)
        self.pages.first_pages[:] = (pages.cumsum(0) - pages).int().to(DEVICE)
        buffers = DecodeBuffers.allocate(R, 1, Hkv, D, dtype, PROGRAMS, DEVICE)
        self.batch = DecodeBatch.of(buffers, 0, R, 1, G)
        starts = torch.arange(R + 1, dtype=torch.int32, device=DEVICE)
        seq_lens = torch.full((R,), n + 1, dtype=torch.int32, device=DEVICE)
        self.rows = Rows(self.table, starts, seq_lens, torch.arange(R, device=DEVICE))
        self.schedule(torch_ops.schedule_decode)
        tokens = R * (int(lengths.sum()) + Hkv * (WINDOW + 1 if budget else n + 1))
        self.model = {
            "bytes": tokens * 2 * D * self.cache.element_size(),
            "flop": tokens * 4 * D * G,
        }

    def schedule(self, op: Any) -> None:
        """Write the schedule."""
        op(self.batch, self.pages, WINDOW, P, self.rows)


@pytest.mark.parametrize("budget", [256, 1024, None] if GPU else [64, None])  # None: not pruned
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_sparse_decode(benchmark: Any, case: tuple[int, ...], budget: int | None) -> None:
    step = Step(*case, budget)
    op = sparse_decode if GPU else torch_ops.sparse_decode

    def run() -> None:
        op(step.query, step.cache, 0, step.table, step.batch, step.output, D**-0.5)

    timed(benchmark, run, **step.model)
