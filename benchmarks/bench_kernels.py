"""The kernels under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

On a GPU the kernels and, where they fit, their torch twins; elsewhere the twins at small sizes. The
cases are those of the GPU suite, with fewer layers and longer prompts.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from decode_model import QWEN, VICUNA
from gpu_parts.bench import DRY_STEPS, STEPS
from gpu_parts.device import Device
from timed_cases import TINY, Decode, Model, P, Prune, Step

from sparsemm_vllm.environment import has_gpu
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, QueryTiles, Rows
from sparsemm_vllm.triton_kernels.tile_sizes import decode_queries, decode_rows

GPU = has_gpu()
DEVICE = Device(dry=not GPU)
OPS = triton_ops if GPU else torch_ops
CASES = STEPS if GPU else DRY_STEPS
BOTH = [triton_ops, torch_ops] if GPU else [torch_ops]
DTYPE = torch.bfloat16 if GPU else torch.float32
MISTRAL = Model("mistral-7b", 32, 32, 8, 128, 7.2e9)
MODELS = [VICUNA, MISTRAL, QWEN] if GPU else [TINY]
PROMPTS = [4096, 32768, 131072] if GPU else [200]  # tokens
# A full batch, whose schedule is as long as any; its cache is not filled.
FULL = Step(VICUNA, 256, 256) if GPU else Step(TINY, 8, 64, n=200)
ANSWER = 64  # tokens, whose most attended keys are found


def name(case: Any) -> str:
    """An id of a case."""
    return case.__name__.rpartition(".")[2] if isinstance(case, ModuleType) else case.name


def timed(benchmark: Any, function: Callable[[], Any], **costs: float) -> None:
    """Time a function until the device is done.

    Args:
        benchmark: fixture of pytest-benchmark.
        function: function that launches kernels.
        costs: bytes that it moves and operations that it does, by name.
    """

    def run() -> None:
        function()
        DEVICE.synchronize()

    benchmark.extra_info |= costs | {"device": torch.cuda.get_device_name() if GPU else "CPU"}
    benchmark.pedantic(run, warmup_rounds=3, rounds=20)


def decode(step: Step, programs_each: int | None = None) -> Decode:
    """A scheduled step of one layer."""
    step = replace(step, model=replace(step.model, L=1))
    return Decode(DEVICE, step, DTYPE, programs_each=programs_each, ops=OPS)


@pytest.mark.parametrize("step", CASES, ids=name)
def bench_sparse_decode(benchmark: Any, step: Step) -> None:
    setup = decode(step)
    operations = 2 * step.model.G / setup.cache.element_size()  # for each byte of keys and values
    timed(benchmark, lambda: setup.layer(0), bytes=setup.bytes, flop=operations * setup.bytes)


@pytest.mark.parametrize("step", [FULL, CASES[0]], ids=name)
def bench_schedule_decode(benchmark: Any, step: Step) -> None:
    """The schedule of all layers, once a step: lengths and pages in; both and the sums out."""
    setup = Decode(DEVICE, step, DTYPE, programs_each=2, ops=OPS)
    timed(benchmark, setup.schedule, bytes=step.batch * step.model.L * step.model.Hkv * 4 * 5)


@pytest.mark.parametrize("step", [case for case in CASES[:3] if case.budget], ids=name)
def bench_list_pages(benchmark: Any, step: Step) -> None:
    """Places of head pages, once for each pruned prompt: a variant of the decode kernel's."""
    setup = decode(step)
    C = int(setup.pages.compact_blocks[0])
    pages = step.batch * C * step.model.Hkv
    timed(benchmark, lambda: setup.list_pages(setup.pages, C), bytes=8 * pages)


@pytest.mark.parametrize("ops", BOTH, ids=name)
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("n", PROMPTS)
@pytest.mark.parametrize("model", MODELS, ids=name)
@pytest.mark.parametrize("step", ["scores", "select", "compact"])
def bench_prune(
    benchmark: Any, step: str, model: Model, n: int, fp8: bool, ops: ModuleType
) -> None:
    """A step of the prune of one prompt, one layer."""
    model = replace(model, L=1)
    budget = 256 if GPU else 64
    setup = Prune(DEVICE, model, n, budget, DTYPE, fp8, ops)
    setup.run("scores", "select")
    flop = setup.flop if step == "scores" else 0
    timed(benchmark, lambda: setup.run(step), bytes=setup.bytes[step], flop=flop)


@pytest.mark.parametrize("chunk", [1, 2048])  # tokens of the last row
@pytest.mark.parametrize("R", [1, 256] if GPU else [8])
@pytest.mark.parametrize("ops", BOTH, ids=name)
def bench_correct_slots(benchmark: Any, ops: ModuleType, R: int, chunk: int) -> None:
    """Slots of a decode step's tokens, and of a step with one long chunk of a prompt."""
    n, place = 64 * P, {"device": DEVICE.torch}
    queries = torch.ones(R, dtype=torch.int32)
    queries[-1] = chunk
    starts = torch.cat([torch.zeros(1), queries.cumsum(0)]).int().to(**place)
    seq_lens = (n + queries).to(**place)
    seq_lens[-1] = chunk + (n if chunk == 1 else 0)
    pages = HeadPages.empty(R, 1, 1, DEVICE.torch)
    pages.prompt_tokens.fill_(n if chunk == 1 else 2 * chunk)
    pages.prompt_tokens[:-1] = n
    pages.compact_blocks.fill_(4)
    slots = torch.zeros(int(queries.sum()), dtype=torch.int64, **place)
    table = torch.ones(R, 4 * n // P, dtype=torch.int32, **place)
    rows = Rows(table, starts, seq_lens, torch.arange(R, **place))
    args = slots, torch.full_like(slots, n), rows, pages, P, chunk
    moved = (R if chunk == 1 else R - 1) * (16 + 4) + R * 40
    timed(benchmark, lambda: ops.correct_slots(*args), bytes=moved)


@pytest.mark.parametrize("n", [3072, 16384] if GPU else [1024])
@pytest.mark.parametrize(("Hkv", "G"), [(32, 1), (4, 7)])  # Vicuna-7B; Qwen2-VL-7B
@pytest.mark.parametrize("ops", BOTH, ids=name)
def bench_top_keys(benchmark: Any, ops: ModuleType, Hkv: int, G: int, n: int) -> None:
    """The most attended keys of an answer's tokens, one layer, one prompt."""
    D, options = 128, {"dtype": torch.bfloat16, "device": DEVICE.torch}
    cache = torch.randn(1 + n // P, Hkv, P, 2 * D, **options)
    query = torch.randn(n, Hkv * G, D, **options)
    table = 1 + torch.arange(n // P, dtype=torch.int32, device=DEVICE.torch)[None]
    block_q = decode_queries(ANSWER, G, decode_rows(D, torch.bfloat16))
    tiles = QueryTiles.pack([(0, n - ANSWER, ANSWER, n - ANSWER, 0)], block_q, DEVICE.torch)
    output = torch.empty(ANSWER, Hkv * G, dtype=torch.int32, device=DEVICE.torch)
    costs = {"bytes": 2 * Hkv * n * D, "flop": 2 * ANSWER * Hkv * G * n * D}
    timed(benchmark, lambda: ops.top_keys(query, cache, table, tiles, output), **costs)
