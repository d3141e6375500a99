"""The kernels of a step: the warm-up launches them, and listed head pages change no token."""

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import DEVICE

from sparsemm_vllm.engine.attention.forward import forward_sparse
from sparsemm_vllm.engine.worker import warm_up as warm_up_module
from sparsemm_vllm.engine.worker.state import PrunedCache
from sparsemm_vllm.engine.worker.warm_up import warm_up
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import Rows
from support.steps import LAYOUT, LONG, MAX_REQUESTS, P, make_state, plan


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("max_pages", [0, 40])
def test_warm_up_launches_every_serving_kernel_and_changes_nothing(monkeypatch, dtype, max_pages):
    """What vLLM hands over: a null block, tables of zeros."""
    state = make_state(max_pages=max_pages)
    state.ops = triton_ops
    cache = torch.zeros(3, 1, 2, P, 2 * 16, dtype=dtype, device=DEVICE)
    state.attach(PrunedCache(cache, {}))
    launched = set()
    for name in triton_ops.__all__:
        launch = getattr(triton_ops, name)

        def watch(*args, name=name, launch=launch):
            launched.add(name)
            launch(*args)

        monkeypatch.setattr(triton_ops, name, watch)
    block_table = torch.zeros(MAX_REQUESTS, 128, dtype=torch.int32, device=DEVICE)
    warm_up(state, dtype, block_table)
    unused = {"top_keys"} if max_pages else {"top_keys", "list_pages"}  # of profiling, of a variant
    assert launched == set(triton_ops.__all__) - unused
    assert not cache.any()
    assert not block_table.any()
    assert not state.pages.compact_blocks.any()


def test_warm_up_asks_the_compiled_kernels_how_many_fit(monkeypatch):
    """Tiles of 16, 32 and 64 query rows are kernels of their own, with registers of their own."""
    state = make_state(G=4)
    state.ops = SimpleNamespace(**{name: getattr(triton_ops, name) for name in triton_ops.__all__})
    state.attach(
        PrunedCache(torch.zeros(3, 1, 2, P, 2 * 16, dtype=torch.bfloat16, device=DEVICE), {})
    )
    state.ops.sparse_decode = lambda *args: args[4].block_m  # in place of a compiled kernel
    fitting = {16: 2, 32: 1, 64: 100}
    monkeypatch.setattr(warm_up_module, "resident_programs", lambda kernel, _: fitting[kernel])
    warm_up(state, torch.bfloat16, torch.zeros(MAX_REQUESTS, 128, dtype=torch.int32, device=DEVICE))
    programs = {queries: state.decode_batch(0, 2, queries).programs for queries in (1, 4, 8, 16)}
    assert programs == {1: 2, 4: 2, 8: 1, 16: 3}, "no more than there is scratch memory for"
    assert state.long_decode_batch(0, LONG).programs == 3


@pytest.mark.parametrize("kernels", [torch_ops, triton_ops], ids=["torch", "triton"])
def test_listed_pages_lead_to_the_same_tokens(kernels):
    """A prompt is pruned and decoded, with places of head pages listed or computed."""
    n, outputs = 90, []
    C = LAYOUT.compact_blocks(n, P)
    row = 1 + torch.randperm(20, generator=torch.Generator().manual_seed(1))
    table = row.int().to(DEVICE)[None]
    for max_pages in (0, C * 3 * 2 + 1):
        state = make_state(max_pages=max_pages)
        state.ops = kernels
        generator = torch.Generator().manual_seed(2)
        cache = torch.randn(3, 21, 2, P, 32, generator=generator).to(torch.bfloat16).to(DEVICE)
        query = torch.randn(n, 4, 16, generator=generator).to(torch.bfloat16).to(DEVICE)
        state.attach(PrunedCache(cache, {f"layers.{i}": i for i in range(3)}))
        state.add(5, n)
        for computed, queries in ((0, n), (n, 1)):
            step = plan(state, [(5, computed, queries)])
            lens = torch.tensor([computed + queries], dtype=torch.int32, device=DEVICE)
            starts = torch.tensor([0, queries], dtype=torch.int32, device=DEVICE)
            none = torch.zeros(queries, dtype=torch.int64, device=DEVICE)
            request = torch.full((1,), 5, dtype=torch.int32, device=DEVICE)
            step.prepare(none, none, Rows(table, starts, lens, request))
            for layer in range(3):
                output = torch.zeros_like(query[:queries])
                named = SimpleNamespace(layer_name=f"layers.{layer}")
                forward_sparse(step, named, query[:queries], output, table, 0.25)
                outputs.append(output)
    half = len(outputs) // 2
    assert all(map(torch.equal, outputs[:half], outputs[half:]))
    assert all(output.abs().sum() > 0 for output in outputs[3:half]), "decoded"
