"""What is timed: decode steps of equal prompts, and prunes; on a GPU or on the CPU in its place.

`bench_kernels.py` times them under pytest-benchmark, the GPU suite without.
"""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from decode_model import Attention as Model
from gpu_parts.device import Device
from kernel_cases import head_pages
from models.head_scores import concentrated_scores

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.triton_kernels import triton_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, PruneWorkspace, Rows
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.tile_sizes import DecodeOptions, padded_queries

P, W, KERNEL_SIZE = 16, 32, 5
# As sparsemm_vllm.engine.worker.model_state has it, which needs vLLM.
MOST_PROGRAMS_PER_MULTIPROCESSOR = 4


TINY = Model("tiny", 3, 8, 4, 32, 1e6)


@dataclass(frozen=True)
class Step:
    """A decode step that is measured.

    Attributes:
        model: model whose attention it is.
        batch: number of requests.
        budget: tokens that a head keeps on average; dense if None.
        n: prompt tokens of each request.
        layout: layout of the cache; LBHNC is what vLLM serves SPARSEMM with.
        fp8: whether the cache holds e4m3.
    """

    model: Model
    batch: int
    budget: int | None = None
    n: int = 8192
    layout: str = "LBHNC"
    fp8: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        kept = "dense" if self.budget is None else f"B={self.budget}"
        parts = [f"decode {self.model.name} {kept} batch={self.batch}"]
        if self.n != type(self).n:
            parts.append(f"n={self.n}")
        if self.fp8:
            parts.append("fp8")
        if self.layout != type(self).layout:
            parts.append(self.layout)
        return " ".join(parts)


def head_scores(model: Model) -> torch.Tensor:
    """Visual scores ``[L, Hq]``, made up: as concentrated as LLaVA-NeXT-Vicuna-7B's."""
    return concentrated_scores(model.L, model.Hq, seed=7)


def empty_cache(
    model: Model, blocks: int, layout: str, dtype: torch.dtype, place: torch.device
) -> torch.Tensor:
    """A cache whose values are not set, ``[L, B, Hkv, P, 2 * D]``."""
    head_major = layout == "LBHNC"
    inner = (model.Hkv, P) if head_major else (P, model.Hkv)
    cache = torch.empty(model.L, blocks, *inner, 2 * model.D, dtype=dtype, device=place)
    return cache if head_major else cache.transpose(2, 3)


def make_cache(
    device: Device, model: Model, blocks: int, layout: str, dtype: torch.dtype
) -> torch.Tensor:
    """A cache of random values, ``[L, B, Hkv, P, 2 * D]``."""
    cache = empty_cache(model, blocks, layout, dtype, device.torch)
    for layer in cache:  # e4m3 numbers are not drawn, but rounded; a layer at a time has room
        layer.copy_(torch.randn(layer.shape, device=device.torch))
    return cache


class Decode:
    """One decode step of equal prompts, right after they were pruned; dense without a budget."""

    def __init__(
        self,
        device: Device,
        step: Step,
        dtype: torch.dtype = torch.bfloat16,
        options: DecodeOptions | None = None,
        programs_each: int | None = None,
        ops: ModuleType = triton_ops,
    ) -> None:
        """Fill a cache and schedule the step.

        Args:
            device: device that it runs on.
            step: lengths and budget.
            dtype: type of the queries, and of the cache if it is not fp8.
            options: options that the kernel is compiled with; as in serving if not given.
            programs_each: programs of a multiprocessor; as many as it runs at once if not given.
            ops: module of the kernels, or of their torch twins.
        """
        self.ops = ops
        model, n, batch, budget = step.model, step.n, step.batch, step.budget
        cache_dtype = torch.float8_e4m3fn if step.fp8 else dtype
        self.device, self.model, self.n, self.batch = device, model, n, batch
        L, Hq, Hkv, D = model.L, model.Hq, model.Hkv, model.D
        kept = torch.zeros(L, Hkv, dtype=torch.int64)
        C, owned = 0, -(-(n + 1) // P)
        if budget is not None:
            heads = CacheLayout.from_scores(head_scores(model), Hkv, budget, W)
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
        self.cache = make_cache(device, model, 1 + batch * owned, step.layout, cache_dtype)
        self.scales = tuple(torch.ones(2, 1, device=device.torch)) if step.fp8 else (None, None)
        self.query = torch.randn(batch, Hq, D).to(dtype).to(device.torch)
        self.output = torch.empty_like(self.query)
        self.start = torch.arange(batch + 1, dtype=torch.int32, device=device.torch)
        self.seq_lens = torch.full((batch,), n + 1, dtype=torch.int32, device=device.torch)

        if options is not None and options.lists_pages and C:
            pages = self.list_pages(pages, C)
        self.pages = pages
        most = MOST_PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors
        sizes = batch * Hq, L, Hkv, D, cache_dtype, most, device.torch, dtype
        units = pages.page_units
        self.rows = DecodeBatch.of(
            DecodeBuffers.allocate(*sizes), 0, batch, 1, Hq // Hkv, None, options, units
        )
        programs = (programs_each or 0) * device.multiprocessors
        self.schedule()
        programs = min(most, programs or device.resident(lambda: self.layer(0)))
        self.rows = replace(self.rows, programs=programs)
        self.schedule()
        tokens = kept.sum(1) + Hkv * (W + 1 if C else n + 1)
        self.layer_bytes = (batch * 2 * D * cache_dtype.itemsize * tokens).tolist()
        self.bytes = sum(self.layer_bytes) / L  # of a layer, on average

    def list_pages(self, pages: HeadPages, C: int) -> HeadPages:
        """The same with the places of the head pages."""
        most = C * self.model.L * self.model.Hkv
        units = torch.zeros(self.batch, most, dtype=torch.int32, device=self.device.torch)
        pages = replace(pages, page_units=units)
        rows = [(i, i, 0, self.n) for i in range(self.batch)]
        prompts = Prompts.pack(rows, 0, self.device.torch)
        self.ops.list_pages(self.cache, self.table, prompts, pages)
        return pages

    def schedule(self) -> None:
        """As a step does it once."""
        given = Rows(self.table, self.start, self.seq_lens, self.start[: self.batch])
        self.ops.schedule_decode(self.rows, self.pages, W, P, given)

    def layer(self, layer: int) -> Any:
        """Attention of one layer; Triton's compiled kernel."""
        args = self.table, self.rows, self.output, self.model.D**-0.5, *self.scales
        return self.ops.sparse_decode(self.query, self.cache, layer, *args)

    def step(self) -> None:
        for layer in range(self.model.L):
            self.layer(layer)


class Prune:
    """The prune of one prompt: scoring, selection and compaction, layer by layer.

    Args:
        device: device that it runs on.
        model: model whose attention it is.
        n: prompt tokens.
        budget: tokens that a head keeps on average.
        dtype: type of the queries, and of the cache.
        fp8: whether the cache holds e4m3.
        ops: module of the kernels, or of their torch twins.

    Attributes:
        steps: functions of a layer by their names, in their order.
        bytes: bytes that each of them moves in all layers, by name.
        flop: floating-point operations of the scores of all layers.
    """

    def __init__(
        self,
        device: Device,
        model: Model,
        n: int,
        budget: int,
        dtype: torch.dtype,
        fp8: bool = False,
        ops: ModuleType = triton_ops,
    ) -> None:
        L, Hq, Hkv, D = model.L, model.Hq, model.Hkv, model.D
        heads = CacheLayout.from_scores(head_scores(model), Hkv, budget, W)
        kept = torch.from_numpy(heads.kept_tokens(n))
        N, C = -(-n // P), heads.compact_blocks(n, P)
        pages = head_pages([n], kept[None], [C], P)
        cache_dtype = torch.float8_e4m3fn if fp8 else dtype
        cache = make_cache(device, model, 1 + N + C, "LBHNC", cache_dtype)
        scale = torch.ones(1, device=device.torch) if fp8 else None
        table = (1 + torch.randperm(N + C)).int()[None].to(device.torch)
        query = torch.randn(W, Hq, D).to(dtype).to(device.torch)
        prompts = Prompts.pack([(0, 0, W, n)], int(kept.max()), device.torch)
        workspace = PruneWorkspace.allocate(n, Hq, Hkv, W, device.torch)

        def score(layer: int) -> None:
            args = table, prompts, workspace, W, KERNEL_SIZE, D**-0.5, scale
            ops.window_scores(query, cache[layer], *args)

        def select(layer: int) -> None:
            ops.select_tokens(prompts, workspace, pages.lengths[:, layer], W)

        def compact(layer: int) -> None:
            ops.compact_kv(cache, layer, table, prompts, workspace, pages)

        self.layers = L
        self.steps = {"scores": score, "select": select, "compact": compact}
        self.flop = 4 * L * Hkv * padded_queries(Hq // Hkv, W) * n * D
        item, tokens = cache_dtype.itemsize, int(kept.sum())
        # The keys once, a sum and a score of each token; kept keys and values, read and written.
        self.bytes = {
            "scores": L * Hkv * n * (D * item + 8),
            "select": 4 * (L * Hkv * n + tokens),
            "compact": 4 * tokens * D * item,
        }

    def run(self, *names: str) -> None:
        """Do these steps for each layer."""
        for layer in range(self.layers):
            for name in names:
                self.steps[name](layer)
