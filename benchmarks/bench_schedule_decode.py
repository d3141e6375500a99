"""The schedule of a decode step, all layers in one launch, once a step."""

from typing import Any

import pytest
import torch
from common import DEVICE, GPU, timed

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Rows
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.schedule_decode import schedule_decode

P, WINDOW, D = 16, 32, 128


# Requests, layers, KV heads: a full batch of Vicuna-7B; on the CPU a small one.
@pytest.mark.parametrize("case", [(32, 32, 32), (256, 32, 32)] if GPU else [(8, 4, 4)], ids=str)
def bench_schedule_decode(benchmark: Any, case: tuple[int, ...]) -> None:
    R, L, Hkv = case
    generator = torch.Generator().manual_seed(0)
    pages = HeadPages.empty(R, L, Hkv, DEVICE)
    pages.prompt_tokens.fill_(8192)
    pages.compact_blocks.fill_(16)
    lengths = torch.randint(0, 5337, pages.lengths.shape, generator=generator, dtype=torch.int32)
    pages.lengths.copy_(lengths)
    buffers = DecodeBuffers.allocate(R, L, Hkv, D, torch.bfloat16, 264, DEVICE)
    batch = DecodeBatch.of(buffers, 0, R, 1, 1)
    starts = torch.arange(R + 1, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.full((R,), 8200, dtype=torch.int32, device=DEVICE)
    requests = torch.arange(R, device=DEVICE)
    rows = Rows(starts.view(-1, 1), starts, seq_lens, requests)  # no block table is read
    op = schedule_decode if GPU else torch_ops.schedule_decode

    def run() -> None:
        op(batch, pages, WINDOW, P, rows)

    # Lengths and first pages in; both, and the running sum, out.
    timed(benchmark, run, bytes=R * L * Hkv * 4 * 5)
