"""A worker's state, and steps that are planned with it."""

import numpy as np
import torch
from kernel_cases import DEVICE

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.worker.state import (
    DECODE_QUERIES,
    Capacity,
    Heads,
    PrunedCache,
    SparseState,
)
from sparsemm_vllm.engine.worker.step import plan_step

P, W, BASE = 16, 4, 20
FIRST_PRUNED = W + BASE
# Pages of an empty head, a part of one, one, two, four and as many as the prompt has.
LAYOUT = CacheLayout(((0, 1), (P, P + 1), (50, 5000)), window=W, base=BASE)
MAX_REQUESTS = 8
LONG = DECODE_QUERIES + 1


def make_state(
    prompts=(), G=2, D=16, max_requests=MAX_REQUESTS, max_tokens=1024, drafts=0, max_pages=0
):
    """A rank that runs requests of these prompts, by their indices."""
    own = LAYOUT.slice_of(0, 0)
    state = SparseState(
        LAYOUT,
        own,
        Heads(L=3, Hq=2 * G, Hkv=2, D=D, dtype=torch.bfloat16),
        Capacity(max_requests, max_tokens, 3, decode_queries=1 + drafts, pages=max_pages),
        DEVICE,
    )
    state.attach(PrunedCache(torch.empty(3, 1, 2, P, 2 * D, device=DEVICE), {}))
    for index, n in enumerate(prompts):
        state.add(index, n)
    return state


def plan(state, rows, padded=None):
    """Plan a batch of ``(request, tokens before the step, tokens in it)``."""
    requests, computed, queries = (np.array(column) for column in zip(*rows, strict=True))
    starts = np.concatenate([[0], np.cumsum(queries)])
    return plan_step(state, requests, starts, computed + queries, padded)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_rows(rng, rows, width=64):
    """Block tables with distinct blocks, 0 for the null block."""
    blocks = rng.permutation(np.arange(1, 1 + rows * width)).reshape(rows, width)
    return int32(blocks)
