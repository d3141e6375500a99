"""A step must not wait for the device: no operation whose result the host has to see."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from vllm.config.compilation import CUDAGraphMode

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine.attention import cuda as cuda_backend
from sparsemm_vllm.engine.attention.forward import forward_sparse
from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.engine.worker.model_state import DefaultModelState, SparseMMModelState
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.engine.worker.step import capture_step, plan_step
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import Rows
from support.dense_metadata import dense_metadata
from support.meta_batches import on_device, vllm_batch, vllm_common
from support.no_waiting import META, no_waiting

L, HKV, G, D, P, WINDOW = 2, 3, 2, 16, 8, 4
LAYOUT = CacheLayout(capacities=((0, 1, 40), (8, 9, 3)), window=WINDOW, base=10, pool_kernel=3)
N = 61  # prompt tokens
LONG = 20  # queries: more than the decode kernel's buffers take


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Memory that stands for pinned memory, which there is none of without a GPU."""
    made: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device.type == "cpu"
        made.append(tensor.clone())
        return made[-1]

    def is_pinned(tensor: torch.Tensor) -> bool:
        start = tensor.untyped_storage().data_ptr()
        return any(start == each.untyped_storage().data_ptr() for each in made)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    return made


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
    heads, capacity = Heads(L, HKV * G, HKV, D, torch.float32), Capacity(4, 256, 3, **options)
    state = SparseState(layout, layout.slice_of(0, 0), heads, capacity, device)
    cache = torch.randn(L, 40, HKV, P, 2 * D, device=device)
    state.attach(PrunedCache(cache, {Layer(i).layer_name: i for i in range(L)}))
    state.add(0, N)
    return state


def plan(state: SparseState, computed: int, queries: int) -> Any:
    """A step of request 0 alone."""
    seq_lens = np.array([computed + queries])
    return plan_step(state, np.array([0]), np.array([0, queries]), seq_lens)


def pageable() -> torch.Tensor:
    return torch.ones(3, dtype=torch.int32)


@pytest.mark.parametrize(
    "waits",
    [lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero],
    ids=["item", "mask", "nonzero"],
)
def test_the_watch_sees_values_that_are_read(waits: Any) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="waits"), no_waiting(x.device):
        waits(x)


COPIES = {
    "number to one element": lambda: on_device(3).__setitem__(1, 5),
    "number of numpy's": lambda: on_device(2, 3).__setitem__((1, 2), np.int64(5)),
    "pageable, by copy_": lambda: on_device(2, 3)[0].copy_(pageable(), non_blocking=True),
    "pageable, by to": lambda: pageable().to(META, non_blocking=True),
    "pageable, assigned": lambda: on_device(2, 3).__setitem__(0, pageable()),
    "pinned, but blocking": lambda: on_device(3).copy_(pageable().pin_memory()),
    "pinned, with gaps": lambda: pageable().pin_memory()[::2].to(META, non_blocking=True),
    "list": lambda: torch.tensor([1, 2], device=META),
    "list of indices": lambda: on_device(3)[[0, 2]],
    "indices of the host": lambda: on_device(3)[torch.tensor([0, 2])],
    "to the host": lambda: on_device(3).cpu(),
}
NO_COPIES = {
    "number to a slice": lambda: on_device(3).__setitem__(slice(1, 2), 5),
    "number to a row": lambda: on_device(2, 3).__setitem__(1, 5),
    "pinned": lambda: pageable().pin_memory().to(META, non_blocking=True),
    "slice of pinned memory": lambda: on_device(2).copy_(pageable().pin_memory()[1:], True),
    "device to device": lambda: on_device(2, 3).__setitem__(0, on_device(3)),
    "host to host": lambda: pageable().__setitem__(1, 5),
    "element": lambda: on_device(3)[1] + 1,
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_the_watch_sees_copies_that_wait(copy: Any) -> None:
    reasons = r"copied from the host|copies from the host|waits for the device"
    with pytest.raises(AssertionError, match=reasons), no_waiting():
        copy()


@pytest.mark.parametrize("copy", NO_COPIES.values(), ids=NO_COPIES)
def test_the_watch_lets_others_pass(copy: Any) -> None:
    with no_waiting():
        copy()


def test_the_watch_sees_the_twins_wait() -> None:
    """They may. Were everything exempt that a step calls, the tests below would prove nothing."""
    state = make_state(DEVICE)
    state.ops = torch_ops
    query = torch.randn(N, HKV * G, D, device=DEVICE)
    blocks = torch.arange(1, 33, dtype=torch.int32, device=DEVICE)[None]
    with pytest.raises(AssertionError, match="waits"), no_waiting(DEVICE):
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
        slots = torch.zeros(queries, dtype=torch.int64, device=DEVICE)
        positions = torch.arange(computed, computed + queries, device=DEVICE)
        rows = Rows(
            blocks,
            torch.tensor([0, queries], dtype=torch.int32, device=DEVICE),
            torch.tensor([computed + queries], dtype=torch.int32, device=DEVICE),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
        )
        with no_waiting(DEVICE):
            step.prepare(slots, positions, rows)
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
    state.attention.add(0, n, [1, 2])
    blocks = torch.arange(1, 33, dtype=torch.int32, device=DEVICE)[None]
    query = torch.randn(n, HKV * G, D, device=DEVICE)
    output = torch.empty_like(query)
    for computed, queries in [(0, n), (n, 1)]:
        step = plan(state, computed, queries)
        starts = torch.tensor([0, queries], dtype=torch.int32, device=DEVICE)
        lens = torch.tensor([computed + queries], dtype=torch.int32, device=DEVICE)
        none = torch.zeros(queries, dtype=torch.int64, device=DEVICE)
        with no_waiting(DEVICE):
            step.prepare(none, none, Rows(blocks, starts, lens, lens[:0]))
            for layer in range(L):
                forward_sparse(step, Layer(layer), query[:queries], output[:queries], blocks, 0.25)
    keys = state.attention.keys
    assert (keys[:, 1:] >= 0).all()
    assert (keys[:, 0] == -1).all()
    positions = torch.tensor([-1, n - 2, n - 1, n], dtype=torch.int32, device=DEVICE)
    assert (keys <= positions[None, :, None]).all(), "no query sees the future"


# On the meta device


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels that would have been launched."""
    launched: list[Any] = []
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn)
    )
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: launched.append(self.fn))
    return launched


@pytest.mark.parametrize("method", ["sparsemm", "adakv", "random"])
def test_requests_are_entered_without_the_device(method: str, pinned: list[torch.Tensor]) -> None:
    state = make_state(META, replace(LAYOUT, method=method), recorded_queries=4)
    assert state.attention is not None
    del pinned[:]
    with no_waiting():
        state.add(1, 9)  # not pruned
        state.add(2, N, "name", seed=3, layout=replace(LAYOUT, method=method))
        state.attention.add(1, 9, [1, 2])
        state.knockouts.add(1, 9, [0, 1, 5])
    assert len(pinned) == 2, "one copy for each request"


def test_what_is_entered_arrives() -> None:
    """In place of what stood there, and nowhere else."""
    state, pages = make_state(DEVICE), make_state(DEVICE).pages
    for tensor in (pages.prompt_tokens, pages.compact_blocks, pages.lengths, pages.first_pages):
        tensor.fill_(-1)
    lengths = torch.arange(L * HKV).reshape(L, HKV)
    pages.enter(2, 77, 5, lengths, 10 + lengths)
    for i in range(4):
        expected = [77, 5, lengths.tolist(), (10 + lengths).tolist()] if i == 2 else None
        found = [pages.prompt_tokens[i].item(), pages.compact_blocks[i].item()]
        found += [pages.lengths[i].tolist(), pages.first_pages[i].tolist()]
        assert found == (expected or [-1, -1, [[-1] * HKV] * L, [[-1] * HKV] * L])
    state.add(1, N)
    assert state.pages.prompt_tokens.tolist() == [N, N, 0, 0]
    assert state.pages.lengths[1].tolist() == LAYOUT.kept_tokens(N).tolist()


def test_a_step_is_planned_without_the_device() -> None:
    state = make_state(META)
    with no_waiting():
        state.add(1, 9)
        prunes = plan(state, 0, N)
        assert prunes.prunes
        assert plan(state, N, LONG).pruned_rows == [0]
        assert capture_step(state, 4, 1).short_rows == 4
    with pytest.raises(RuntimeError):
        prunes.prunes[0].table.tolist()


# Of each request: prompt tokens, tokens after the step, and queries.
STEPS = {
    "decodes": [(N, N + 1, 1), (N, N + 3, 3), (N, N + 16, 16), (9, 10, 1)],
    "a prompt ends": [(N, N + 1, 1), (N, N, N)],
    "two prompts end, one goes on": [(N, N, 40), (N, N, WINDOW), (N, 30, 30)],
    "resumed": [(N, N + 1, 1), (N, 40, 40), (N, N + LONG, LONG)],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("method", ["sparsemm", "adakv", "random"])
def test_a_step_is_made_without_the_device(
    monkeypatch: pytest.MonkeyPatch, unlaunched: list[Any], name: str, method: str
) -> None:
    """From `add_request` to `forward` of each layer, through the worker's own classes."""
    builder: Any = object.__new__(cuda_backend.SparseMMMetadataBuilder)
    worker: Any = object.__new__(SparseMMModelState)
    state = worker._state = make_state(META, replace(LAYOUT, method=method))
    worker._group, state.ops = 0, triton_ops
    worker._serving = Serving(Settings(), LAYOUT, RequestLimits(LAYOUT.window, 0))
    prompts, seq_lens, queries = zip(*STEPS[name], strict=True)
    starts = np.cumsum([0, *queries]).tolist()
    common = vllm_common(starts, list(seq_lens))
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: None)
    monkeypatch.setattr(
        DefaultModelState, "prepare_attn", lambda *_, **__: builder.build(0, common)
    )
    monkeypatch.setattr(cuda_backend.FlashAttentionMetadataBuilder, "build", dense_metadata)
    batch = vllm_batch(starts, list(seq_lens))
    slots = torch.zeros(1, starts[-1], dtype=torch.int64, device=META)
    group = SimpleNamespace(get_metadata_builder=lambda _: builder)
    impl = cuda_backend.SparseMMImpl(HKV * G, D, 0.25, HKV)
    query = torch.empty(starts[-1], HKV * G, D, device=META)
    output = torch.empty_like(query)
    requests = [
        SimpleNamespace(
            prompt_len=n,
            req_id=str(i),
            prompt_token_ids=[i],
            mm_features=[],
            sampling_params=SimpleNamespace(extra_args=None, max_tokens=9),
        )
        for i, n in enumerate(prompts)
    ]
    with no_waiting():
        for index, request in enumerate(requests):
            worker.add_request(index, request)
        meta = worker.prepare_attn(
            batch, CUDAGraphMode.NONE, (on_device(len(seq_lens), 32),), slots, [[group]], None
        )
        for layer in range(L):
            cache = state.cache.tensor[layer]
            key = query[:, :HKV]
            impl.forward(Layer(layer), query, key, key, cache, meta, output)
    assert builder.step.decodes or builder.step.prunes
    assert unlaunched


def test_metadata_is_built_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short row, a prompt, and a resumed row whose length must be shortened."""
    monkeypatch.setattr(cuda_backend.FlashAttentionMetadataBuilder, "build", dense_metadata)
    state = make_state(META)
    starts, seq_lens = [0, 1, 41, 41 + LONG], [N + 1, 40, N + LONG]
    builder = object.__new__(cuda_backend.SparseMMMetadataBuilder)
    builder.step = plan_step(state, np.zeros(3, dtype=int), np.array(starts), np.array(seq_lens))
    assert builder.step.pruned_rows == [2]
    with no_waiting():
        meta = builder.build(0, vllm_common(starts, seq_lens))
    assert meta.dense.seq_lens.shape == (2,)
    assert meta.dense.seq_lens.is_meta


def test_a_head_is_knocked_out_without_the_device(unlaunched: list[Any]) -> None:
    """With attention recorded, as a profile is made."""
    state = make_state(META, replace(LAYOUT, method="full"), recorded_queries=4)
    state.ops = triton_ops
    assert state.attention is not None
    query = torch.empty(N, HKV * G, D, device=META)
    with no_waiting():
        state.add(0, N)
        state.attention.add(0, N, [1, 2])
        state.knockouts.add(0, N, [1, 2, N - 3])
        step = plan(state, 0, N)
        for layer in range(L):
            forward_sparse(
                step, Layer(layer), query, torch.empty_like(query), on_device(1, 32), 0.25
            )
    assert step.recorded is not None
    assert step.knockouts
    assert len(unlaunched) == L, "the queries of each layer are recorded"
