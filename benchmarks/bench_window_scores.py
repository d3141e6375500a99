"""Scoring a prompt for pruning: the kernel on a GPU, its torch twin anywhere."""

import pytest
import torch
from common import DEVICE, GPU, timed

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import Prompts, PruneWorkspace
from sparsemm_vllm.triton_kernels.window_scores import window_scores

W, D, P, KERNEL_SIZE = 32, 128, 16, 5
LENGTHS = [2048, 8192, 32768, 131072] if GPU else [512]
OPS = {"triton": window_scores, "torch": torch_ops.window_scores}


@pytest.mark.parametrize("op", ["triton", "torch"] if GPU else ["torch"])
@pytest.mark.parametrize(
    ("Hkv", "G"),
    [
        pytest.param(32, 1, id="mha"),  # Vicuna-7B
        pytest.param(8, 4, id="gqa4"),  # Mistral-7B
        pytest.param(4, 7, id="gqa7"),  # Qwen2-VL-7B
    ],
)
@pytest.mark.parametrize("n", LENGTHS)
def bench_window_scores(benchmark, n, Hkv, G, op):
    dtype = torch.bfloat16 if GPU else torch.float32
    blocks = -(-n // P)
    order = torch.randperm(blocks, device=DEVICE) + 1
    cache = torch.randn(blocks + 1, P, Hkv, 2 * D, device=DEVICE, dtype=dtype).transpose(1, 2)
    query = torch.randn(W, Hkv * G, D, device=DEVICE, dtype=dtype)
    table = order.int()[None]
    prompts = Prompts.pack([(0, 0, W, n)], 1, DEVICE)
    workspace = PruneWorkspace.allocate(n, Hkv * G, Hkv, W, DEVICE)
    arguments = (query, cache, table, prompts, workspace, W, KERNEL_SIZE, D**-0.5)
    # The keys once, sums written and read, scores written; both products.
    timed(
        benchmark,
        lambda: OPS[op](*arguments),
        bytes=Hkv * n * D * cache.element_size() + 12 * Hkv * (n - W),
        flop=4 * W * Hkv * G * n * D,
    )
