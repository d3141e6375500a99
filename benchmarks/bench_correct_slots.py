"""Slots of a decode step's tokens, and of a step with one long chunk of a prompt."""

import pytest
import torch
from common import DEVICE, GPU, timed

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Rows
from sparsemm_vllm.triton_kernels.correct_slots import correct_slots

P, N, C = 16, 64, 4
TWIN = pytest.param(torch_ops.correct_slots, id="torch")
OPS = [pytest.param(correct_slots, id="triton"), TWIN] if GPU else [TWIN]
ROWS = [1, 256] if GPU else [8]


@pytest.mark.parametrize("chunk", [1, 2048])  # tokens of the last row
@pytest.mark.parametrize("R", ROWS)
@pytest.mark.parametrize("op", OPS)
def bench_correct_slots(benchmark, op, R, chunk):
    n = N * P
    queries = torch.ones(R, dtype=torch.int32)
    queries[-1] = chunk
    query_start = torch.cat([torch.zeros(1), queries.cumsum(0)]).int().to(DEVICE)
    seq_lens = (n + queries).to(DEVICE)
    seq_lens[-1] = chunk + (n if chunk == 1 else 0)
    pages = HeadPages.empty(R, 1, 1, DEVICE)
    pages.prompt_tokens.fill_(n if chunk == 1 else 2 * chunk)
    pages.prompt_tokens[:-1] = n
    pages.compact_blocks.fill_(C)
    T = int(queries.sum())
    slots = torch.zeros(T, dtype=torch.int64, device=DEVICE)
    positions = torch.full((T,), n, dtype=torch.int64, device=DEVICE)
    table = torch.ones(R, 4 * N, dtype=torch.int32, device=DEVICE)
    requests = torch.arange(R, device=DEVICE)
    rows = Rows(table, query_start, seq_lens, requests)
    args = (slots, positions, rows, pages, P, chunk)
    decoded = R if chunk == 1 else R - 1
    timed(benchmark, lambda: op(*args), bytes=decoded * (16 + 4) + R * 40, flop=0)
