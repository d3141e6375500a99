"""Selection of the kept tokens of one layer, one prompt."""

import pytest
import torch
from common import DEVICE, GPU, timed

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import Prompts, PruneWorkspace
from sparsemm_vllm.triton_kernels.select_tokens import select_tokens

W = 32
TWIN = pytest.param(torch_ops.select_tokens, id="torch")
OPS = [pytest.param(select_tokens, id="triton"), TWIN] if GPU else [TWIN]
# Prompt tokens: one tile of scores, an image or two, a long document.
TOKENS = [4096, 16384, 131072] if GPU else [2048]


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("Hkv", [8, 32])  # LLaMA 3 and Qwen2-VL 72B; Vicuna 7B
@pytest.mark.parametrize("op", OPS)
def bench_select_tokens(benchmark, op, Hkv, n):
    m = n - W
    prompts = Prompts.pack([(0, 0, 0, n)], m, DEVICE)
    workspace = PruneWorkspace.allocate(n, Hkv, Hkv, W, DEVICE)
    workspace.scores.copy_(torch.rand(workspace.scores.shape))
    # Most heads keep few tokens, one keeps nearly all.
    lengths = torch.full((1, Hkv), 34, dtype=torch.int32)
    lengths[0, -1] = m - 1
    lengths = lengths.to(DEVICE)
    timed(
        benchmark,
        lambda: op(prompts, workspace, lengths, W),
        bytes=4 * Hkv * m + 4 * (34 * (Hkv - 1) + m - 1),
        flop=0,
    )
