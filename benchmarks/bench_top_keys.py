"""The most attended keys of an answer's tokens, one layer, one prompt."""

import pytest
import torch
from common import DEVICE, GPU, timed

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import QueryTiles
from sparsemm_vllm.triton_kernels.tile_sizes import decode_queries, decode_rows
from sparsemm_vllm.triton_kernels.top_keys import top_keys

D, P = 128, 16
QUERIES = 64  # tokens of an answer
TWIN = pytest.param(torch_ops.top_keys, id="torch")
OPS = [pytest.param(top_keys, id="triton"), TWIN] if GPU else [TWIN]
TOKENS = [3072, 16384] if GPU else [1024]


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize(("Hkv", "G"), [(32, 1), (4, 7)])  # Vicuna 7B; Qwen2-VL 7B
@pytest.mark.parametrize("op", OPS)
def bench_top_keys(benchmark, op, Hkv, G, n):
    cache = torch.randn(1 + n // P, Hkv, P, 2 * D, dtype=torch.bfloat16, device=DEVICE)
    query = torch.randn(n, Hkv * G, D, dtype=torch.bfloat16, device=DEVICE)
    table = 1 + torch.arange(n // P, dtype=torch.int32, device=DEVICE)[None]
    block_q = decode_queries(QUERIES, G, decode_rows(D, torch.bfloat16))
    tiles = QueryTiles.pack([(0, n - QUERIES, QUERIES, n - QUERIES, 0)], block_q, DEVICE)
    output = torch.empty(QUERIES, Hkv * G, dtype=torch.int32, device=DEVICE)
    timed(
        benchmark,
        lambda: op(query, cache, table, tiles, output),
        bytes=2 * Hkv * n * D,
        flop=2 * QUERIES * Hkv * G * n * D,
    )
