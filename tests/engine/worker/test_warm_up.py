"""Nothing is compiled while requests are served: the warm-up launches every kernel that they need.

Triton believes in a GPU and keeps its own account of what is compiled: each kernel with its
constants and the specialisation of its arguments (types, alignment, what is 1 or divides by 16).
Only the compiler itself is left out. So this runs in a process of its own, without the interpreter.
"""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from support.children import compiling, python
from support.dense_metadata import dense_metadata

WINDOW, BASE = 32, 64
MAX_REQUESTS, MAX_TOKENS = 20, 20_000
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

# Type of the queries and of the cache, query heads of a KV head, KV heads, draft tokens, requests,
# head pages that are listed.
CASES = {
    "vicuna": (BF16, BF16, 1, 32, 0, MAX_REQUESTS, 0),
    "qwen": (BF16, BF16, 7, 4, 0, MAX_REQUESTS, 0),
    "listed pages": (BF16, BF16, 7, 4, 0, MAX_REQUESTS, 1000),
    "drafts": (BF16, BF16, 4, 8, 20, MAX_REQUESTS, 0),
    "fp8": (torch.float16, FP8, 4, 2, 0, MAX_REQUESTS, 0),
    "float32": (torch.float32, torch.float32, 2, 3, 3, MAX_REQUESTS, 0),
    "one head, one request": (BF16, BF16, 1, 1, 0, 1, 0),
}


OURS = {
    "_window_stats",
    "_window_sums",
    "_pool",
    "_select_tokens_kernel",
    "_compact_kv_kernel",
    "_correct_slots_kernel",
    "_schedule_decode",
    "_sparse_decode",
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What was launched in each case, and what was compiled after the warm-up."""
    done = python(__file__, environment=compiling())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_while_serving(found: dict[str, Any], name: str) -> None:
    case = found[name]
    assert case["compiled while serving"] == []
    assert set(case["launched"]) >= OURS
    vllms = "kernel_unified_attention" in case["launched"]
    assert vllms == (name in ("fp8", "float32"))
    assert case["compiled in the warm-up"] >= 15


class Compiler:
    """Counts what Triton would compile.

    Attributes:
        compiled: name and specialisation of each kernel, in the order of compilation.
        launched: names of the kernels that were launched.
    """

    def __init__(self) -> None:
        from kernel_launches import Gpu
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        self.compiled: list[str] = []
        self.launched: set[str] = set()
        self._kernels: list[Any] = []
        driver.set_active(Gpu(90))
        run = JITFunction.run

        def only_prepare(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.launched.add(kernel.__name__)
            self._kernels.append(kernel)
            return run(kernel, *args, **kwargs | {"warmup": True})

        def count(kernel: Any, key: str, signature: Any, device: int, *_: Any) -> object:
            self.compiled.append(f"{kernel.__name__} {key}")
            kernel.device_caches[device][0][key] = self
            return self

        JITFunction.run = only_prepare
        JITFunction._do_compile = count

    def forget(self) -> None:
        """Begin anew, as in another process."""
        for kernel in self._kernels:
            kernel.device_caches.clear()
        self.compiled, self.launched, self._kernels = [], set(), []


def serve(compiler: Compiler, name: str) -> dict[str, Any]:
    """Warm up and serve; what was compiled when, and what was launched."""
    from sparsemm_vllm.engine.worker import warm_up
    from sparsemm_vllm.triton_kernels import triton_ops

    warm_up.resident_programs = lambda *_: 132  # what a GPU says of a compiled kernel
    compiler.forget()
    dtype, cache_dtype, G, Hkv, drafts, max_requests, listed = CASES[name]
    state = make_state(dtype, cache_dtype, G, Hkv, drafts, max_requests, listed)
    state.ops = triton_ops
    width = 2 * MAX_TOKENS // 16
    block_table = torch.zeros(max_requests, width, dtype=torch.int32)
    layers = [make_layer(i, state, dtype) for i in range(2)]
    warm_up.warm_up(state, dtype, block_table)
    for layer in layers:
        layer.impl.warm_up_dense(layer, dtype, block_table)
    warmed = len(compiler.compiled)
    for batch in batches(max_requests, drafts):
        step(state, layers, dtype, block_table, batch)
    for rows in range(1, max_requests + 1):
        decodes = [(500, 500, 1 + drafts)] * rows
        step(state, layers, dtype, block_table, decodes, for_capture=True)
    return {
        "compiled in the warm-up": warmed,
        "compiled while serving": compiler.compiled[warmed:],
        "launched": sorted(compiler.launched),
    }


def make_state(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    G: int,
    Hkv: int,
    drafts: int,
    requests: int,
    listed: int,
) -> Any:
    from sparsemm_vllm.budget.layout import CacheLayout
    from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState

    L, D = 2, 128
    capacities = tuple(tuple(range(layer, layer + Hkv)) for layer in range(L))
    layout = CacheLayout(capacities, window=WINDOW, base=BASE, pool_kernel=5)
    heads = Heads(L, Hkv * G, Hkv, D, cache_dtype, dtype)
    capacity = Capacity(requests, MAX_TOKENS, 264, decode_queries=1 + drafts, pages=listed)
    state = SparseState(layout, layout.slice_of(0, 0), heads, capacity, torch.device("cpu"))
    cache = torch.empty(L, 4, Hkv, 16, 2 * D, dtype=cache_dtype)
    state.attach(PrunedCache(cache, {"layers.0": 0, "layers.1": 1}))
    return state


def make_layer(index: int, state: Any, dtype: torch.dtype) -> Any:
    """vLLM's attention layer, with the CUDA backend's implementation."""
    from sparsemm_vllm.engine.attention import cuda as cuda_backend

    heads, cache = state.heads, state.cache.tensor
    quantized = cache.dtype == FP8
    impl = cuda_backend.SparseMMImpl(
        heads.Hq, heads.D, heads.D**-0.5, heads.Hkv, kv_cache_dtype="fp8" if quantized else "auto"
    )
    return SimpleNamespace(
        layer_name=f"layers.{index}",
        impl=impl,
        kv_cache=cache[index].view(torch.uint8) if quantized else cache[index],
        _k_scale=torch.tensor(0.5),
        _v_scale=torch.tensor(2.0),
    )


def batches(max_requests: int, drafts: int) -> Iterator[list[tuple[int, int, int]]]:
    """Steps: of each row its prompt, the tokens computed before, and its queries."""
    prompts = (97, 1000, 1057, 2080, 3000, 4128, 4129, 9000)  # around the tiles of select_tokens
    for n in prompts:
        yield [(n, 0, n)]
        yield [(n, n - WINDOW, WINDOW)]
    for queries in (*range(1, 2 + drafts), 16, 17, 33, 40, 100, 1000):  # the last ones: resumed
        yield [(1000, 1000, queries)]
        yield [(1000, 1007, queries)] * min(3, max_requests)
    for rows in range(2, max_requests + 1):
        yield [(500, 500 + i, 1) for i in range(rows)]
        yield [(500, 500 + i, 1) for i in range(rows - 1)] + [(700, 200, 500)]
        yield [(200, 200, 1)] + [(200, 0, 200)] * (rows - 1)
    if max_requests > 4:
        yield [(500, 501, 1), (20, 0, 20), (500, 0, 500), (500, 500, 37), (500, 0, 300)]


def step(
    state: Any,
    layers: list[Any],
    dtype: torch.dtype,
    block_table: torch.Tensor,
    batch: list[tuple[int, int, int]],
    for_capture: bool = False,
) -> None:
    """One step through the CUDA backend's builder and implementation; FlashAttention is vLLM's."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from sparsemm_vllm.engine.attention import cuda as cuda_backend
    from sparsemm_vllm.engine.worker.step import capture_step, plan_step
    from sparsemm_vllm.triton_kernels.batch import Rows

    R = len(batch)
    starts = np.cumsum([0, *(queries for _, _, queries in batch)])
    seq_lens = np.array([computed + queries for _, computed, queries in batch])
    for index, (n, *_) in enumerate(batch):
        state.add(index, n)
    T = int(starts[-1])
    # Persistent buffers of the model runner, of which a step has the beginning.
    query_start = torch.zeros(MAX_REQUESTS + 1, dtype=torch.int32)[: R + 1]
    lengths = torch.zeros(MAX_REQUESTS, dtype=torch.int32)[:R]
    slots = torch.zeros(3, T + 5, dtype=torch.int64)[1, :T]
    positions = torch.zeros(T + 5, dtype=torch.int64)[:T]
    common = CommonAttentionMetadata(
        query_start_loc=query_start,
        query_start_loc_cpu=torch.from_numpy(starts).int(),
        seq_lens=lengths,
        num_reqs=R,
        num_actual_tokens=T,
        max_query_len=int(np.diff(starts).max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=block_table[:R],
        slot_mapping=slots,
    )
    builder: Any = object.__new__(cuda_backend.SparseMMMetadataBuilder)
    requests = torch.arange(R)
    if for_capture:
        builder.step = capture_step(state, R, int(starts[1]))
        requests = requests[:0]
    else:
        builder.step = plan_step(state, np.arange(R), starts, seq_lens)
    rows = Rows(block_table[:R], query_start, lengths, requests)
    builder.step.prepare(slots, positions, rows)
    meta = builder.build(0, common)
    heads = state.heads
    # Queries are a part of what the layer before computed: queries, keys and values of each token.
    qkv = torch.empty(T, (heads.Hq + 2 * heads.Hkv) * heads.D, dtype=dtype)
    query = qkv[:, : heads.Hq * heads.D].view(T, heads.Hq, heads.D)
    output = torch.empty(T, heads.Hq, heads.D, dtype=dtype)
    for layer in layers:
        layer.impl.forward(layer, query, query, query, layer.kv_cache, meta, output)


def without_flash_attention() -> None:
    """Its builder and its kernels, which are compiled already, do nothing."""
    from sparsemm_vllm.engine.attention import cuda as cuda_backend

    cuda_backend.FlashAttentionMetadataBuilder.build = dense_metadata  # type: ignore[method-assign]
    cuda_backend.FlashAttentionImpl.forward = lambda *_: None  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    without_flash_attention()
    counted = Compiler()
    print(json.dumps({case: serve(counted, case) for case in CASES}))
