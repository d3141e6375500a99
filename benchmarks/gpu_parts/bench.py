"""Time of the kernels beside the time that their bytes take at the measured bandwidth."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models.head_scores import concentrated_scores

from gpu_parts.device import Context, Device
from gpu_parts.records import ROOT

sys.path.append(str(ROOT / "tests"))
from kernel_cases import head_pages, relative_error

from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.triton_kernels import triton_ops
from sparsemm_vllm.triton_kernels.batch import (
    DecodeBatch,
    DecodeBuffers,
    Prompts,
    PruneWorkspace,
    padded_queries,
)

NEEDS = 25
P, W, KERNEL_SIZE = 16, 32, 5
PROGRAMS_PER_MULTIPROCESSOR = 2  # as sparsemm_vllm.model_state has it, which needs vLLM


@dataclass(frozen=True)
class Model:
    """Attention of a model, and how many parameters it has."""

    name: str
    L: int
    Hq: int
    Hkv: int
    D: int
    parameters: float


VICUNA = Model("vicuna-7b", 32, 32, 32, 128, 6.7e9)
QWEN = Model("qwen2-vl-7b", 28, 28, 4, 128, 7.6e9)
TINY = Model("tiny", 3, 8, 4, 32, 1e6)


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    models: tuple[Model, ...] = (VICUNA, QWEN)
    prompt: int = 8192
    batches: tuple[int, ...] = (1, 8, 32)
    budgets: tuple[int, ...] = (256, 1024)
    prunes: tuple[int, ...] = (4096, 8192, 32768)
    copied: int = 2 << 30
    gemm: int = 8192
    dtype: torch.dtype = torch.bfloat16
    most_bytes: float = 70e9  # of a cache


DRY = Sizes((TINY,), 200, (1, 2), (64,), (100,), 1 << 20, 64, torch.float32)


def head_scores(model: Model, path: Path | None) -> torch.Tensor:
    """Visual scores ``[L, Hq]``: those of the file if they are this model's, else made up.

    Made up, they are as concentrated as the published ones of LLaVA-NeXT-Vicuna-7B.
    """
    if path is not None:
        found = json.loads(path.read_text())
        if "scores" in found:  # our profiles
            scores = torch.tensor(found["scores"], dtype=torch.float64)
        else:  # the published form: lists of hits by "layer-head"
            flat = [sum(hits) / len(hits) for hits in found.values()]
            scores = torch.zeros(len(flat), dtype=torch.float64)
            layers = 1 + max(int(key.split("-")[0]) for key in found)
            for key, score in zip(found, flat, strict=True):
                layer, head = map(int, key.split("-"))
                scores[layer * (len(flat) // layers) + head] = score
            scores = scores.reshape(layers, -1)
        if scores.shape == (model.L, model.Hq):
            return scores
    return concentrated_scores(model.L, model.Hq, seed=7)


def make_cache(
    device: Device, model: Model, blocks: int, layout: str, dtype: torch.dtype
) -> torch.Tensor:
    """A cache of random values, ``[L, B, Hkv, P, 2 * D]``."""
    if layout == "LBHNC":
        shape = (model.L, blocks, model.Hkv, P, 2 * model.D)
        return torch.empty(shape, dtype=dtype, device=device.torch).normal_()
    shape = (model.L, blocks, P, model.Hkv, 2 * model.D)
    return torch.empty(shape, dtype=dtype, device=device.torch).normal_().transpose(2, 3)


class Decode:
    """One decode step of equal prompts, right after they were pruned; dense without a budget."""

    def __init__(
        self,
        device: Device,
        model: Model,
        scores: torch.Tensor,
        n: int,
        batch: int,
        budget: int | None,
        layout: str = "LBHNC",
        dtype: torch.dtype = torch.bfloat16,
        programs_each: int = PROGRAMS_PER_MULTIPROCESSOR,
        block_n: int | None = None,
    ) -> None:
        self.model, self.n, self.batch, self.dtype = model, n, batch, dtype
        L, Hq, Hkv, D = model.L, model.Hq, model.Hkv, model.D
        kept = torch.zeros(L, Hkv, dtype=torch.int64)
        C, owned = 0, -(-(n + 1) // P)
        if budget is not None:
            heads = CacheLayout.from_scores(scores, Hkv, budget, W)
            kept = torch.from_numpy(heads.kept_tokens(n))
            C = heads.compact_blocks(n, P)
            owned = heads.held_blocks(n, n + 1, P)
        pages = head_pages([n] * batch, kept.expand(batch, L, Hkv), [C] * batch, P)
        # A row's blocks lie anywhere; those that were freed are the null block.
        order = 1 + torch.randperm(batch * owned).reshape(batch, owned)
        width = -(-(n + 1) // P) + C
        table = torch.zeros(batch, width, dtype=torch.int32)
        table[:, width - owned :] = order
        if budget is not None:  # the prompt's last blocks, before the compact ones: all but freed
            assert (width - owned) == heads.freed_blocks(n, P)
        self.table = table.to(device.torch)
        self.cache = make_cache(device, model, 1 + batch * owned, layout, dtype)
        self.query = torch.randn(batch, Hq, D).to(dtype).to(device.torch)
        self.output = torch.empty_like(self.query)
        self.start = torch.arange(batch + 1, dtype=torch.int32, device=device.torch)
        self.seq_lens = torch.full((batch,), n + 1, dtype=torch.int32, device=device.torch)
        requests = self.start[:batch]

        programs = programs_each * device.multiprocessors
        sizes = batch * Hq, L, Hkv, D, dtype, programs
        self.rows = DecodeBatch.of(
            DecodeBuffers.allocate(*sizes, device.torch, block_n), 0, batch, 1, Hq // Hkv
        )
        self.schedule = partial(
            triton_ops.schedule_decode, self.rows, pages, W, P, self.start, self.seq_lens, requests
        )
        self.schedule()
        tokens = int(kept.sum()) + L * Hkv * (W + 1 if C else n + 1)
        self.bytes = batch * tokens * 2 * D * dtype.itemsize / L  # of a layer, on average

    def layer(self, layer: int) -> None:
        args = self.table, self.rows, self.output, self.model.D**-0.5
        triton_ops.sparse_decode(self.query, self.cache, layer, *args)

    def step(self) -> None:
        for layer in range(self.model.L):
            self.layer(layer)

    def balance(self) -> float:
        """Tokens of the program that has most, over the mean; the worst layer's."""
        buffers, Hkv = self.rows.buffers, self.model.Hkv
        items = self.rows.query_tiles * Hkv
        tails = buffers.rows[: self.rows.query_tiles, 7].repeat_interleave(Hkv).cpu()
        worst = 0.0
        for layer in range(self.model.L):
            tokens = buffers.items[layer, :items, 0].cpu() + tails
            tiles = buffers.first_tile[layer, : items + 1].cpu().diff()
            held = torch.full((int(tiles.sum()),), buffers.block_n)
            used = tiles > 0
            held[tiles[used].cumsum(0) - 1] -= (tiles * buffers.block_n - tokens)[used].int()
            share = -(-len(held) // buffers.programs)
            padded = torch.zeros(share * buffers.programs)
            padded[: len(held)] = held
            own = padded.reshape(buffers.programs, share).sum(1)
            worst = max(worst, float(own.max() / own.mean()))
        return worst

    def flash(self) -> Callable[[], None]:
        """The dense step in vLLM's FlashAttention, on the same cache."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        major = torch.cuda.get_device_capability()[0]
        D = self.model.D

        def step() -> None:
            for layer in range(self.model.L):
                key, value = self.cache[layer].transpose(1, 2).split(D, -1)
                flash_attn_varlen_func(
                    self.query,
                    key,
                    value,
                    max_seqlen_q=1,
                    cu_seqlens_q=self.start,
                    max_seqlen_k=self.n + 1,
                    seqused_k=self.seq_lens,
                    softmax_scale=D**-0.5,
                    causal=True,
                    block_table=self.table,
                    out=self.output,
                    fa_version=3 if major == 9 else 2,
                )

        return step


def bandwidth(device: Device, sizes: Sizes) -> dict[str, Any]:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    time = device.time(lambda: target.copy_(source))
    return time | {"bytes_per_second": 2e6 * sizes.copied / time["us"]}


def gemm(device: Device, sizes: Sizes) -> dict[str, Any]:
    """FLOP a second of a square product."""
    a = torch.randn(sizes.gemm, sizes.gemm, device=device.torch).to(sizes.dtype)
    out = torch.empty_like(a)
    time = device.time(lambda: torch.mm(a, a.T, out=out))
    return time | {"flop_per_second": 2e6 * sizes.gemm**3 / time["us"]}


def per_layer(time: dict[str, float], L: int) -> dict[str, float]:
    return {name: value / L for name, value in time.items()}


def decode(context: Context, model: Model, batch: int, budget: int | None) -> dict[str, Any]:
    """A layer's decode, beside what its bytes take, and beside FlashAttention if it is dense."""
    device, sizes = context.device, _sizes(context)
    scores = head_scores(model, context.scores)
    setup = Decode(device, model, scores, sizes.prompt, batch, budget, dtype=sizes.dtype)
    time = per_layer(device.time(device.graph(setup.step)), model.L)
    rate = context.results["copy bandwidth"]["bytes_per_second"]
    predicted = 1e6 * setup.bytes / rate
    result = time | {
        "kept_bytes": setup.bytes,
        "predicted_us": predicted,
        "ratio": time["us"] / predicted,
        "balance": setup.balance(),
        "schedule_us": device.time(device.graph(setup.schedule))["us"],
    }
    if budget is not None:
        return result
    if device.dry:
        return result | {"flash": "skipped: needs a GPU"}
    try:
        flash = setup.flash()
    except ImportError as error:
        return result | {"flash": f"skipped: {error}"}
    expected = setup.output.clone()  # of the last layer
    times = per_layer(device.time(device.graph(flash)), model.L)
    error = relative_error(expected, setup.output)
    assert error < 2e-2, f"FlashAttention's output differs by {error:.1e}"
    return result | {"flash": times, "error": error, "times_flash": time["us"] / times["us"]}


def prune(context: Context, model: Model, n: int) -> dict[str, Any]:
    """Scoring, selection and compaction of all layers, beside an estimate of the prefill."""
    device, sizes = context.device, _sizes(context)
    L, Hq, Hkv, D = model.L, model.Hq, model.Hkv, model.D
    heads = CacheLayout.from_scores(head_scores(model, context.scores), Hkv, sizes.budgets[0], W)
    kept = torch.from_numpy(heads.kept_tokens(n))
    N, C = -(-n // P), heads.compact_blocks(n, P)
    pages = head_pages([n], kept[None], [C], P)
    cache = make_cache(device, model, 1 + N + C, "LBHNC", sizes.dtype)
    table = (1 + torch.randperm(N + C)).int()[None].to(device.torch)
    query = torch.randn(W, Hq, D).to(sizes.dtype).to(device.torch)
    prompts = Prompts.pack([(0, 0, W, n)], int(kept.max()), device.torch)
    workspace = PruneWorkspace.allocate(n, Hq, Hkv, W, device.torch)

    def score(layer: int) -> None:
        args = table, prompts, workspace, W, KERNEL_SIZE, D**-0.5
        triton_ops.window_scores(query, cache[layer], *args)

    def select(layer: int) -> None:
        triton_ops.select_tokens(prompts, workspace, pages.lengths[:, layer], W)

    def compact(layer: int) -> None:
        triton_ops.compact_kv(cache, layer, table, prompts, workspace, pages)

    def all_layers(*ops: Callable[[int], None]) -> None:
        for layer in range(L):
            for op in ops:
                op(layer)

    result: dict[str, Any] = {}
    for name, ops in (
        ("scores", (score,)),
        ("select", (select,)),
        ("compact", (compact,)),
        ("all", (score, select, compact)),
    ):
        result[name] = device.time(device.graph(partial(all_layers, *ops)))
    item = sizes.dtype.itemsize
    result["flop"] = 4 * L * Hkv * padded_queries(Hq // Hkv, W) * n * D
    result["bytes"] = L * Hkv * n * (D * item + 8) + 4 * int(kept.sum()) * D * item
    copy = context.results["copy bandwidth"]["bytes_per_second"]
    product = context.results["bf16 product"]["flop_per_second"]
    result["predicted_us"] = 1e6 * (result["bytes"] / copy + result["flop"] / product)
    prefill = (2 * model.parameters * n + 2 * L * Hq * n * n * D) / product
    result["prefill_us"] = 1e6 * prefill
    result["share_of_prefill"] = result["all"]["us"] / result["prefill_us"]
    return result


def _sizes(context: Context) -> Sizes:
    return DRY if context.device.dry else Sizes()


def cases(context: Context) -> dict[str, Callable[[], dict[str, Any]]]:
    """The device's rates first: the others are told beside them."""
    device, sizes = context.device, _sizes(context)
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "copy bandwidth": partial(bandwidth, device, sizes),
        "bf16 product": partial(gemm, device, sizes),
    }
    for model in sizes.models:
        token = 2 * model.L * model.Hkv * model.D * sizes.dtype.itemsize
        for batch in sizes.batches:
            for budget in sizes.budgets:
                name = f"decode {model.name} B={budget} batch={batch}"
                found[name] = partial(decode, context, model, batch, budget)
            if batch * sizes.prompt * token <= sizes.most_bytes:
                name = f"decode {model.name} dense batch={batch}"
                found[name] = partial(decode, context, model, batch, None)
        for n in sizes.prunes:
            found[f"prune {model.name} n={n}"] = partial(prune, context, model, n)
    return found


def summary(results: dict[str, Any]) -> list[str]:
    """A line for each case."""
    lines = []
    for name, r in results.items():
        if "bytes_per_second" in r:
            lines.append(f"{name}: {r['bytes_per_second'] / 1e9:.0f} GB/s")
        elif "flop_per_second" in r:
            lines.append(f"{name}: {r['flop_per_second'] / 1e12:.1f} TFLOP/s")
        elif "ratio" in r:
            line = f"{name:40} {r['us']:8.1f} us/layer ({r['us_20']:.1f}..{r['us_80']:.1f})"
            line += f", {r['kept_bytes'] / 1e6:.1f} MB, {r['ratio']:.2f}x predicted"
            line += f", balance {r['balance']:.2f}"
            if "times_flash" in r:
                line += f", {r['times_flash']:.2f}x FlashAttention"
            lines.append(line)
        else:
            parts = (f"{op} {r[op]['us'] / 1e3:.2f}" for op in ("scores", "select", "compact"))
            line = f"{name:40} {r['all']['us'] / 1e3:8.2f} ms ({', '.join(parts)})"
            lines.append(f"{line}, {100 * r['share_of_prefill']:.2f} % of the prefill")
    return lines
