"""A step must not wait for the device: no operation whose result the host has to see."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter
from vllm.v1.attention.backend import CommonAttentionMetadata

from sparsemm_vllm import cuda_backend
from sparsemm_vllm.attention_record import RECORD
from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.sparse_attention import forward_sparse
from sparsemm_vllm.step import Heads, PrunedCache, SparseState, capture_step, plan_step
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops

L, HKV, G, D, P, WINDOW = 2, 3, 2, 16, 8, 4
LAYOUT = CacheLayout(capacities=((0, 1, 40), (8, 9, 3)), window=WINDOW, base=10, pool_kernel=3)
N = 61  # prompt tokens
LONG = 20  # queries: more than the decode kernel's buffers take

# What reads a value, or makes a shape from values, on the device.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class NoWaiting(TorchDispatchMode):
    """Raises where CUDA would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"aten::{name} waits for the device")
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, f"aten::{name} with a mask waits for the device"
        if name == "repeat_interleave":
            size = (kwargs or {}).get("output_size")
            assert size is not None, "repeat_interleave waits for the device"
        return func(*args, **(kwargs or {}))


class Layer:
    """vLLM's attention layer, as far as the backends look at it."""

    def __init__(self, index: int) -> None:
        self.layer_name = f"layers.{index}"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels that ran: what stands for the device may read tensors, launchers may not."""
    ran: list[Any] = []
    call = interpreter.GridExecutor.__call__

    def unwatched(executor: Any, *args: Any, **kwargs: Any) -> None:
        ran.append(executor.fn)
        with _disable_current_modes():
            call(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unwatched)
    return ran


def make_state(device: torch.device, layout: CacheLayout = LAYOUT, **options: Any) -> SparseState:
    """Request 0 is pruned."""
    own, heads = layout.slice_of(0, 0), Heads(L, HKV * G, HKV, D)
    state = SparseState(layout, own, heads, torch.float32, 4, 256, 3, device, **options)
    cache = torch.randn(L, 40, HKV, P, 2 * D, device=device)
    state.attach(PrunedCache(cache, {Layer(i).layer_name: i for i in range(L)}))
    state.add(0, N)
    return state


def plan(state: SparseState, computed: int, queries: int) -> Any:
    """A step of request 0 alone."""
    seq_lens = np.array([computed + queries])
    return plan_step(state, np.array([0]), np.array([0, queries]), seq_lens)


@pytest.mark.parametrize("waits", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero])
def test_the_mode_sees_waiting(waits: Any) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError), NoWaiting():
        waits(x)


def test_the_mode_sees_the_twins_wait() -> None:
    """They may. Were everything exempt that a step calls, the tests below would prove nothing."""
    state = make_state(DEVICE)
    state.ops = torch_ops
    query = torch.randn(N, HKV * G, D, device=DEVICE)
    blocks = torch.arange(1, 33, dtype=torch.int32, device=DEVICE)[None]
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        forward_sparse(plan(state, 0, N), Layer(0), query, query.clone(), blocks, 0.25)


@pytest.mark.parametrize("method", ["sparsemm", "adakv", "random"])
def test_prune_and_decode_do_not_wait(launches: list[Any], method: str) -> None:
    """What the other methods do of their own happens before the step."""
    state = make_state(DEVICE, replace(LAYOUT, method=method))
    state.ops = triton_ops
    blocks = torch.arange(1, 33, dtype=torch.int32, device=DEVICE)[None]
    query = torch.randn(N, HKV * G, D, device=DEVICE)
    output = torch.full_like(query, torch.nan)
    for computed, queries in [(0, N), (N, 1), (N, 3), (N, LONG)]:
        step = plan(state, computed, queries)
        assert bool(step.prunes) == (computed == 0)
        tensors = (
            torch.zeros(queries, dtype=torch.int64, device=DEVICE),
            torch.arange(computed, computed + queries, device=DEVICE),
            blocks,
            torch.tensor([0, queries], dtype=torch.int32, device=DEVICE),
            torch.tensor([computed + queries], dtype=torch.int32, device=DEVICE),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
        )
        with NoWaiting():
            step.prepare(*tensors)
            for layer in range(L):
                forward_sparse(step, Layer(layer), query[:queries], output[:queries], blocks, 0.25)
    assert output[:LONG].isfinite().all()
    assert output[LONG:].isnan().all()
    if DEVICE.type == "cpu":
        ops = 5 if method == "random" else 6
        assert len({kernel.__name__ for kernel in launches}) >= ops, "every op ran a kernel"


def test_recording_does_not_wait(launches: list[Any]) -> None:
    """Two queries of a prompt that is too short to be pruned, then a generated token."""
    n = 9
    state = make_state(DEVICE, recorded_queries=4)
    state.ops = triton_ops
    assert state.attention is not None
    state.add(0, n)
    state.attention.add(0, n, {RECORD: [1, 2]})
    blocks = torch.arange(1, 33, dtype=torch.int32, device=DEVICE)[None]
    query = torch.randn(n, HKV * G, D, device=DEVICE)
    output = torch.empty_like(query)
    for computed, queries in [(0, n), (n, 1)]:
        step = plan(state, computed, queries)
        starts = torch.tensor([0, queries], dtype=torch.int32, device=DEVICE)
        lens = torch.tensor([computed + queries], dtype=torch.int32, device=DEVICE)
        none = torch.zeros(queries, dtype=torch.int64, device=DEVICE)
        with NoWaiting():
            step.prepare(none, none, blocks, starts, lens, lens[:0])
            for layer in range(L):
                forward_sparse(step, Layer(layer), query[:queries], output[:queries], blocks, 0.25)
    keys = state.attention.keys
    assert (keys[:, 1:] >= 0).all()
    assert (keys[:, 0] == -1).all()
    positions = torch.tensor([-1, n - 2, n - 1, n], dtype=torch.int32, device=DEVICE)
    assert (keys <= positions[None, :, None]).all(), "no query sees the future"


# A meta tensor has no values: what reads one, on whatever path, raises.
META = torch.device("meta")


def test_a_step_is_planned_without_the_device() -> None:
    state = make_state(META)
    state.add(1, 9)
    prunes = plan(state, 0, N)
    assert prunes.prunes
    assert plan(state, N, LONG).pruned_rows == [0]
    assert capture_step(state, 4, 1).short_rows == 4
    with pytest.raises(RuntimeError):
        prunes.prunes[0].table.tolist()


def test_metadata_is_built_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short row, a prompt, and a resumed row whose length must be shortened."""

    def dense_build(self: Any, prefix: int, given: Any, fast_build: bool) -> Any:
        return given

    monkeypatch.setattr(cuda_backend.FlashAttentionMetadataBuilder, "build", dense_build)
    state = make_state(META)
    starts = torch.tensor([0, 1, 41, 41 + LONG], dtype=torch.int32)
    seq_lens = [N + 1, 40, N + LONG]
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(META),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=META),
        num_reqs=3,
        num_actual_tokens=41 + LONG,
        max_query_len=40,
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.zeros(3, 32, dtype=torch.int32, device=META),
        slot_mapping=torch.zeros(41 + LONG, dtype=torch.int64, device=META),
    )
    builder = object.__new__(cuda_backend.SparseMMMetadataBuilder)
    builder.step = plan_step(state, np.zeros(3, dtype=int), starts.numpy(), np.array(seq_lens))
    assert builder.step.pruned_rows == [2]
    meta = builder.build(0, common)
    assert meta.dense.seq_lens.shape == (2,)
    assert meta.dense.seq_lens.is_meta
