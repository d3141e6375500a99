"""Copy of the kept tokens of one layer, one prompt."""

import pytest
import torch
from common import DEVICE, GPU, timed

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, PruneWorkspace
from sparsemm_vllm.triton_kernels.compact_kv import compact_kv

P, W = 16, 32
TWIN = pytest.param(torch_ops.compact_kv, id="torch")
OPS = [pytest.param(compact_kv, id="triton"), TWIN] if GPU else [TWIN]
# Prompt tokens, and kept tokens of the head that keeps most; the others keep 34.
SIZES = [(4096, 2048), (32768, 5337)] if GPU else [(1024, 300)]


@pytest.mark.parametrize(("n", "longest"), SIZES)
@pytest.mark.parametrize("heads", [(8, 128), (32, 128), (4, 80)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("op", OPS)
def bench_compact_kv(benchmark, op, dtype, heads, n, longest):
    L, (Hkv, D) = 2, heads
    lengths = torch.full((1, L, Hkv), 34, dtype=torch.int32)
    lengths[0, :, -1] = longest
    pages = (-(-lengths // P)).flatten()
    first_pages = (pages.cumsum(0) - pages).reshape(lengths.shape).int()
    N, C = -(-n // P), -(-int(pages.sum()) // (L * Hkv))
    # Storage as vLLM's: layer, block, token, head.
    storage = torch.zeros(L, N + C + 1, P, Hkv, 2 * D, dtype=dtype, device=DEVICE)
    cache = storage.transpose(2, 3)
    table = 1 + torch.randperm(N + C, dtype=torch.int32)[None].to(DEVICE)
    head_pages = HeadPages(
        torch.tensor([n], dtype=torch.int32, device=DEVICE),
        torch.tensor([C], dtype=torch.int32, device=DEVICE),
        lengths.to(DEVICE),
        first_pages.to(DEVICE),
    )
    prompts = Prompts.pack([(0, 0, n, n)], longest, DEVICE)
    workspace = PruneWorkspace.allocate(n, Hkv, Hkv, W, DEVICE)
    for head in range(Hkv):
        kept = torch.randperm(n - W)[: lengths[0, 0, head]].sort().values
        workspace.positions[head, : len(kept)] = kept.int()
    kept_tokens = int(lengths[0, 0].sum())
    timed(
        benchmark,
        lambda: op(cache, 0, table, prompts, workspace, head_pages),
        bytes=kept_tokens * (4 * D * cache.element_size() + 8),
        flop=0,
    )
