"""What AdaKV and random do with scores in torch: as on the CPU, and without waiting for the GPU."""

from functools import partial
from typing import Any

import torch

from gpu_parts.device import Cases, Context, Device
from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.attention.forward import score_at_random, split_layer
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.triton_kernels.batch import Prompts, columns

NEEDS = 5

L, P, D, WINDOW = 2, 16, 128, 32
DTYPE = torch.bfloat16
SIZES = [(4, 224), (32, 224), (8, 2016)]  # KV heads, base budget
PROMPTS = (0, 1, 777, 16_000)  # tokens more than the shortest that is pruned
DRY = [(3, 20)], (0, 1, 77)


def run(
    layout: CacheLayout, lengths: list[int], scores: torch.Tensor, device: torch.device
) -> list[torch.Tensor]:
    """Scores, lengths and first pages of all prompts, on the host."""
    Hkv = len(scores)
    rows = [(i, len(lengths) - 1 - i, 0, n) for i, n in enumerate(lengths)]
    prompts = Prompts.pack(rows, 0, device)
    own, heads = (slice(0, L), slice(0, Hkv)), Heads(L, Hkv, Hkv, D, DTYPE)
    capacity = Capacity(len(lengths), scores.shape[1], 1)
    state = SparseState(layout, own, heads, capacity, device)
    state.attach(PrunedCache(torch.empty(L, 1, Hkv, P, 2 * D, dtype=DTYPE, device=device), {}))
    state.seeds = [2**63 + i for i in range(len(lengths))]
    state.workspace.scores.copy_(scores)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in range(L):
            if layout.rules.token_scores is not None:
                score_at_random(state, layer, prompts)
            if layout.rules.split is not None:
                split_layer(state, layer, prompts)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return [x.cpu() for x in (state.workspace.scores, state.pages.lengths, state.pages.first_pages)]


def check(
    device: Device, method: str, Hkv: int, base: int, more: tuple[int, ...]
) -> dict[str, Any]:
    """The same numbers, of scores whose sums are exact."""
    layout = CacheLayout(((base,) * Hkv,) * L, window=WINDOW, base=base, method=method)
    lengths = [base + WINDOW + extra for extra in more]
    shape = Hkv, columns(sum(map(columns, lengths)))
    generator = torch.Generator().manual_seed(base)
    larger = torch.arange(1, Hkv + 1)[:, None]  # for later heads: splits are uneven
    scores = (torch.rand(shape, generator=generator) ** 2 * 64 * larger / Hkv).ceil()
    mine, expected = (
        run(layout, lengths, scores, where) for where in (device.torch, torch.device("cpu"))
    )
    for ours, theirs in zip(mine, expected, strict=True):
        assert torch.equal(ours, theirs), f"{method}: not as on the CPU"
    if layout.rules.split is not None:
        uneven = (expected[1][:, 0].amax(1) > expected[1][:, 0].amin(1)).sum()
        assert uneven >= len(lengths) - 2, "even splits prove nothing"
    else:
        assert not torch.equal(expected[0], scores)
    return {"prompts": len(lengths)}


def cases(context: Context) -> Cases:
    """Both methods at several sizes."""
    sizes, more = DRY if context.device.dry else (SIZES, PROMPTS)
    return {
        f"{method} Hkv={Hkv} base={base}": partial(check, context.device, method, Hkv, base, more)
        for method in ("adakv", "random")
        for Hkv, base in sizes
    }
