"""Launches of all kernels as serving makes them, on CPU tensors: each ends after compiling.

Triton believes in a GPU meanwhile. `kernel_report.py` looks at what was compiled.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sparsemm_vllm.triton_kernels import triton_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, PruneWorkspace, QueryTiles, Rows
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.tile_sizes import decode_queries, decode_rows

# Shared memory that a program may have, and what the programs of a multiprocessor share. Source:
# CUDA C++ programming guide, technical specifications per compute capability; of the former the
# system takes 1 KiB.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,  # of the cache, beside bfloat16 queries
}
FIRST_FP8 = 89  # Triton cannot convert e4m3 on older targets

VARIANTS = (None, "pdl", "lists_pages")


@dataclass(frozen=True)
class Case:
    """A configuration; what its kernel does not depend on is None.

    Attributes:
        op: name of the launcher.
        arch: compute capability, as in ``sm_90``.
        dtype: type of the cache, see `DTYPES`.
        D: head size.
        P: page size in tokens.
        G: query heads per KV head.
        Q: largest number of queries of a decode row.
        n: prompt tokens.
        single: whether it is a launch of layer 1 for one request and one KV head. Triton compiles
            arguments that are 1 as constants, which is a kernel of its own.
        variant: field of `DecodeOptions` that is switched on, "pdl" or "lists_pages".
    """

    op: str
    arch: int
    dtype: str | None = None
    D: int | None = None
    P: int | None = None
    G: int | None = None
    Q: int | None = None
    n: int | None = None
    single: bool = False
    variant: str | None = None


def full_matrix() -> Iterator[Case]:
    """Every supported configuration."""
    sizes = (DTYPES, (32, 64, 80, 96, 128, 256), (16, 32, 64, 128), (1, 4, 7), (1, 4, 16))
    for arch, dtype, D, P, G, Q in itertools.product(SHARED_BYTES, *sizes):
        yield from cases(arch, dtype, D, P, G, Q)
        if (P, G, Q) == (16, 1, 1):
            yield from cases(arch, dtype, D, P, G, Q, single=True)


def reduced_matrix() -> Iterator[Case]:
    """What CI has the time for."""
    for arch, dtype, D in itertools.product(SHARED_BYTES, ("bf16", "fp8"), (64, 128)):
        yield from cases(arch, dtype, D, 16, 4, 1)  # tiles of 16 queries
        yield from cases(arch, dtype, D, 16, 7, 16)  # of 64, of which 63 are used
    yield from cases(90, "bf16", 128, 16, 1, 1, single=True)
    for dtype, G, variant in itertools.product(("bf16", "fp8"), (1, 7), VARIANTS):
        yield Case("sparse_decode", 90, dtype, 128, 16, G, 1, variant=variant)


def cases(
    arch: int, dtype: str, D: int, P: int, G: int, Q: int, single: bool = False
) -> Iterator[Case]:
    """Each launcher's part of a configuration, without what it does not depend on."""
    if dtype == "fp8" and arch < FIRST_FP8:
        return
    yield Case("window_scores", arch, dtype, D, P, G, single=single)
    for n in (1001, 2001, 3001, 9001):  # tiles of 1024, 2048 and 4096 scores, and three of these
        yield Case("select_tokens", arch, n=n, single=single)
    yield Case("compact_kv", arch, dtype, D, P, single=single)
    yield Case("correct_slots", arch, P=P, single=single)
    yield Case("list_pages", arch, P=P, G=G, single=single)
    yield Case("schedule_decode", arch, dtype, D, None, G, Q, single=single)
    yield Case("sparse_decode", arch, dtype, D, P, G, Q, single=single)
    if Q == 16 or single:  # answers are recorded as a whole
        yield Case("top_keys", arch, dtype, D, P, G, Q, single=single)


def launch(case: Case) -> None:
    """Call the launcher of `case` as a serving step does."""
    D, P, G, Q = case.D or 128, case.P or 16, case.G or 1, case.Q or 1
    # L and Hkv of Vicuna-7B, Mistral-7B and Qwen2-VL-7B.
    L, Hkv = {1: (32, 32), 4: (32, 8), 7: (28, 4)}[G]
    layer, requests = 5, 3
    if case.single:
        Hkv, layer, requests = 1, 1, 1
    window, n, max_requests, max_blocks = 32, case.n or 3001, 7, 1001
    tokens = requests * n
    cpu = torch.device("cpu")

    dtype = DTYPES[case.dtype or "bf16"]
    scale = torch.ones(1) if dtype.itemsize == 1 else None
    # As served: a head's tokens of a block lie side by side. Nothing is read or written.
    cache = torch.empty(L, 3, Hkv, P, 2 * D, dtype=dtype)
    query = torch.empty(tokens, Hkv * G, D, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    table = torch.zeros(requests, max_blocks, dtype=torch.int32)
    lists_pages = case.op == "list_pages" or case.variant == "lists_pages"
    pages = HeadPages.empty(max_requests, L, Hkv, cpu, max_pages=20 * L * Hkv * lists_pages)
    query_start = torch.zeros(requests + 1, dtype=torch.int32)
    seq_lens = torch.zeros(requests, dtype=torch.int32)
    rows = Rows(table, query_start, seq_lens, torch.zeros(requests, dtype=torch.int32))
    prompts = Prompts.pack([(i, i, (i + 1) * n, n) for i in range(requests)], 1025, cpu)
    workspace = PruneWorkspace.allocate(requests * (n + 16), Hkv * G, Hkv, window, cpu)
    buffers = DecodeBuffers.allocate(requests * Q * G, L, Hkv, D, dtype, 132, cpu)
    batch = DecodeBatch.of(buffers, 0, requests, Q, G, page_units=pages.page_units)
    if case.variant is not None:
        batch = replace(batch, options=replace(batch.options, **{case.variant: True}))

    slots = torch.empty(tokens, dtype=torch.int64)
    block_q = decode_queries(Q, G, decode_rows(D, dtype))
    tiles = QueryTiles.pack([(i, i * n, Q, n, i * Q) for i in range(requests)], block_q, cpu)
    keys = torch.empty(tokens, Hkv * G, dtype=torch.int32)
    output = torch.empty_like(query)
    arguments: dict[str, tuple[Any, ...]] = {
        "window_scores": (query, cache[layer], table, prompts, workspace, window, 5, 0.1, scale),
        "select_tokens": (prompts, workspace, pages.lengths[:, layer], window),
        "compact_kv": (cache, layer, table, prompts, workspace, pages),
        "correct_slots": (slots, slots.clone(), rows, pages, P, Q),
        "list_pages": (cache, table, prompts, pages),
        "schedule_decode": (batch, pages, window, P, rows),
        "sparse_decode": (query, cache, layer, table, batch, output, 0.1, scale, scale),
        "top_keys": (query, cache[layer], table, tiles, keys),
    }
    getattr(triton_ops, case.op)(*arguments[case.op])


class Gpu:
    """Stands in for Triton's driver: a GPU that is only compiled for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its kernels in memory by device: one for each target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[JITFunction, Any, dict[str, Any]]]]:
    """While it lasts, launches end after compiling.

    Gives a list that fills: of each launch the function, Triton's compiled kernel, and the
    arguments that were given by name.
    """
    found = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs | {"warmup": True})
        found.append((self, kernel, kwargs))
        return kernel

    driver.set_active(Gpu(arch))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield found
