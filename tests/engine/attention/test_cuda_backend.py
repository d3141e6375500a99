"""The CUDA backend's own decisions, with FlashAttention replaced by torch."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, FP8
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparsemm_vllm.engine.attention import cuda as cuda_backend
from sparsemm_vllm.engine.attention.cuda import SparseMMBackend, SparseMMMetadataBuilder
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.worker.state import PrunedCache
from sparsemm_vllm.engine.worker.step import capture_step
from sparsemm_vllm.triton_kernels import reference, torch_ops, triton_ops
from support.cuda_batches import (
    HALF,
    HKV,
    LAYERS,
    PRUNED,
    SCALE,
    SHORT,
    Batch,
    D,
    Flash,
    G,
    L,
    attend,
    build,
    close,
    int32,
    lay_out,
    make_impl,
    make_state,
    rows_of,
)


@pytest.fixture(params=[torch_ops, triton_ops], ids=["torch", "triton"])
def ops(request: Any) -> ModuleType:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    return Flash(monkeypatch)


def test_mixed_batch(flash: Flash, ops: ModuleType) -> None:
    state = make_state(ops)
    batch = Batch(
        state,
        [
            (PRUNED, PRUNED + 3, 1),  # 0: decodes, pruned
            (SHORT, SHORT + 5, 1),  # 1: decodes, not pruned
            (PRUNED, PRUNED, 6),  # 2: ends its prompt in few queries
            (PRUNED, PRUNED, 30),  # 3: ends its prompt
            (PRUNED, PRUNED + 25, 20),  # 4: resumed, recomputes its answer
            (PRUNED, 20, 20),  # 5: a first chunk
        ],
    )
    common, cache = batch.common(), state.cache.tensor
    query = torch.randn(78, HKV * G, D).to(DEVICE, HALF)
    meta = build(common, batch.step)
    batch.prepare(common)
    for layer in range(L):
        before = cache.clone()
        output = torch.full_like(query, torch.nan)
        attend(meta, cache, layer, query, output)
        for row in range(len(batch.rows)):
            own = slice(batch.starts[row], batch.starts[row + 1])
            assert close(output[own], batch.expected(layer, query, before)[own]), (layer, row)
        batch.prune(layer, query, before)
        assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7)), "only head pages change"

    (given,) = flash.built
    assert given.num_reqs == 3
    assert given.num_actual_tokens == 70
    for starts in (given.query_start_loc, given.query_start_loc_cpu):
        assert starts.tolist() == [0, 30, 50, 70]
    # Blocks of the resumed row's prompt are gone: no more is read than its queries need.
    assert given.seq_lens.tolist() == [PRUNED, 20, 20]
    assert torch.equal(given.block_table_tensor, batch.block_table[3:])
    assert given.slot_mapping.tolist() == list(range(8, 78))
    assert len(flash.attended) == L
    assert common.seq_lens.tolist() == batch.seq_lens, "vLLM's own tensors stay as they are"


def test_long_rows_alone(flash: Flash, ops: ModuleType) -> None:
    state = make_state(ops)
    batch = Batch(state, [(PRUNED, PRUNED, 40), (SHORT, SHORT + 11, 20)])
    common, cache = batch.common(), state.cache.tensor
    query = torch.randn(60, HKV * G, D).to(DEVICE, HALF)
    expected, output = batch.expected(0, query, cache), torch.full_like(query, torch.nan)
    meta = build(common, batch.step)
    batch.prepare(common)
    attend(meta, cache, 0, query, output)
    assert close(output, expected)
    assert flash.built[0].seq_lens.tolist() == batch.seq_lens


def test_decodes_never_reach_flash_attention(flash: Flash, ops: ModuleType) -> None:
    state = make_state(ops)
    rows = [(PRUNED, PRUNED + 1, 1), (SHORT, 70, 3), (PRUNED, PRUNED + 40, 16)]
    batch = Batch(state, rows)
    common, cache = batch.common(), state.cache.tensor
    query = torch.randn(20, HKV * G, D).to(DEVICE, HALF)
    meta = build(common, batch.step)
    batch.prepare(common)
    before = cache.clone()
    for layer in range(L):
        output = torch.full_like(query, torch.nan)
        attend(meta, cache, layer, query, output)
        assert close(output, batch.expected(layer, query, cache))
    assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7))
    assert (meta.dense, flash.built, flash.attended) == (None, [], [])


@pytest.mark.parametrize("queries", [1, 3])  # without drafts, and with two
def test_replay_of_a_captured_batch(flash: Flash, ops: ModuleType, queries: int) -> None:
    """A graph runs what was launched at capture; only tensors' contents are new."""
    state = make_state(ops)
    cache, R = state.cache.tensor, 4
    filled = cache.clone()
    # vLLM's persistent buffers, with a dummy batch in them.
    common = Batch(state, [(SHORT, 20, queries)] * R).common()
    query = torch.randn(R * queries, HKV * G, D).to(DEVICE, HALF)
    output = torch.full_like(query, torch.nan)
    step = capture_step(state, R, queries)
    meta = build(common, step)
    step.prepare(
        torch.full((R * queries,), -1, device=DEVICE),
        torch.zeros(R * queries, dtype=torch.int64, device=DEVICE),
        rows_of(common, int32([])),
    )
    for layer in range(L):
        attend(meta, cache, layer, query, output)

    rows = [(PRUNED, PRUNED + 9, queries), (SHORT, 70, queries), (PRUNED, 90, queries)]
    for real in (rows, rows[1:], rows[::-1]):  # the next batch has fewer rows, then more
        cache.copy_(filled)
        batch = Batch(state, real, padded=R - len(real))
        fresh = batch.common()
        common.query_start_loc.copy_(fresh.query_start_loc)
        common.seq_lens.copy_(fresh.seq_lens)
        common.block_table_tensor.copy_(fresh.block_table_tensor)
        query.copy_(torch.randn(query.shape))
        batch.prepare(fresh)
        for layer in range(L):
            output.fill_(torch.nan)
            attend(meta, cache, layer, query, output)
            T = len(real) * queries
            assert close(output[:T], batch.expected(layer, query[:T], cache))
            assert output[T:].isnan().all(), "padded rows are nobody's"
    assert (flash.built, flash.attended) == ([], [])


def test_layers_that_stay_dense(flash: Flash) -> None:
    """Sliding-window layers of a mixed model, and batches that stand for none, have no step."""
    state = make_state(torch_ops)
    batch = Batch(state, [(SHORT, 20, 1), (PRUNED, PRUNED, 20)])
    common, cache = batch.common(), state.cache.tensor
    before = cache.clone()
    query = torch.randn(21, HKV * G, D).to(DEVICE, HALF)
    output = torch.empty_like(query)
    meta = build(common, None)
    attend(meta, cache, 0, query, output)
    assert flash.built == [common]
    assert flash.attended == [meta]
    assert close(output, batch.expected(0, query, cache))
    assert torch.equal(before.nan_to_num(7), cache.nan_to_num(7)), "nothing is pruned"


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
def test_every_layout_gives_the_same(flash: Flash, layout: KVCacheLayout) -> None:
    """The kernels read strides; what they write lies where a reader of the same view finds it."""
    answers, caches = [], []
    for chosen in (KVCacheLayout.LBHNC, layout):
        state = make_state(triton_ops)
        laid_out = lay_out(state.cache.tensor, chosen)
        state.attach(PrunedCache(laid_out, LAYERS))
        torch.manual_seed(1)
        batch = Batch(state, [(PRUNED, PRUNED + 3, 1), (PRUNED, PRUNED, 30)])
        query = torch.randn(31, HKV * G, D).to(DEVICE, HALF)
        common, output = batch.common(), torch.full_like(query, torch.nan)
        meta = build(common, batch.step)
        batch.prepare(common)
        for layer in range(L):
            attend(meta, laid_out, layer, query, output)
        answers.append(output)
        caches.append(laid_out.nan_to_num(7))
    assert torch.equal(*answers)
    assert torch.equal(*caches)


# Caches that FlashAttention does not take


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC])
@pytest.mark.parametrize("sliding_window", [None, 11])  # less than a block and a half
@pytest.mark.parametrize(("dtype", "cache_dtype"), [
    (torch.float32, "auto"),
    (torch.float16, "fp8"),
    (torch.float32, "fp8_e4m3"),
])  # fmt: skip
def test_dense_rows_of_other_types(
    flash: Flash,
    dtype: torch.dtype,
    cache_dtype: str,
    sliding_window: int | None,
    layout: KVCacheLayout,
) -> None:
    """vLLM's Triton kernel, told of the page layout and of the scales that a byte stands for."""
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert e4m3")
    state = make_state(torch_ops)
    batch = Batch(state, [(SHORT, 20, 1), (PRUNED, PRUNED, 20), (PRUNED, 30, 30)])
    meta = build(batch.common(), None)
    query = torch.randn(51, HKV * G, D).to(DEVICE, dtype)
    output = torch.full((53, HKV * G, D), torch.nan, dtype=dtype, device=DEVICE)
    scales = {"_k_scale": torch.tensor(1.0), "_v_scale": torch.tensor(1.0)}
    cache = lay_out(state.cache.tensor.float(), layout)[0]
    if cache_dtype != "auto":
        scales = {"_k_scale": torch.tensor(0.5), "_v_scale": torch.tensor(3.0)}
        cache = cache.to(FP8).view(torch.uint8)
    layer = SimpleNamespace(
        layer_name="layers.0", **{name: scale.to(DEVICE) for name, scale in scales.items()}
    )
    kv = query[:, :HKV]
    make_impl(cache_dtype, sliding_window).forward(layer, query, kv, kv, cache, meta, output)

    values = cache if cache_dtype == "auto" else cache.view(FP8).float()
    for row, (_, seq_len, _) in enumerate(batch.rows):
        own = slice(batch.starts[row], batch.starts[row + 1])
        expected = scales["_v_scale"].item() * reference.dense_attention(
            query[own].float(),
            values,
            batch.block_table[row],
            seq_len,
            SCALE * scales["_k_scale"].item(),
            sliding_window,
        )
        assert close(output[own], expected), row
    assert output[51:].isnan().all(), "tokens that pad the batch"
    assert flash.attended == []


def test_memory_is_profiled_by_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without metadata; float32 and fp8 too."""
    calls = []

    def forward(impl: Any, layer: Any, *args: Any) -> None:
        calls.append(args[4])

    monkeypatch.setattr(cuda_backend.FlashAttentionImpl, "forward", forward)
    x = torch.zeros(3, HKV * G, D, device=DEVICE)
    for kv_cache_dtype in ("auto", "fp8"):
        make_impl(kv_cache_dtype).forward(None, x, x, x, x, None, x)
    assert calls == [None, None]


# What vLLM asks


def test_what_the_backend_takes() -> None:
    backend = SparseMMBackend
    assert backend.get_name() == "SPARSEMM"
    assert not backend.supports_kv_connector()
    assert not backend.supports_mm_prefix()
    assert not backend.supports_sink()
    assert not backend.get_impl_cls().supports_dcp
    assert backend.get_builder_cls() is SparseMMMetadataBuilder
    for taken in (None, "auto", "float16", "bfloat16", "fp8", "fp8_e4m3"):
        assert backend.supports_kv_cache_dtype(taken), taken
    for refused in ("fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "nvfp4"):
        assert not backend.supports_kv_cache_dtype(refused), refused
    assert torch.float32 in backend.supported_dtypes


@pytest.mark.parametrize(
    ("cache_dtype", "capability", "refused"),
    [
        ("fp8", (8, 0), True),
        ("fp8_e4m3", (8, 6), True),
        ("fp8", (8, 9), False),
        ("fp8", (9, 0), False),
        ("auto", (8, 0), False),
        (None, (7, 5), False),
    ],
)
def test_fp8_needs_a_gpu_that_converts_it(
    cache_dtype: str | None, capability: tuple[int, int], refused: bool
) -> None:
    why = SparseMMBackend.supports_combination(
        128, HALF, cache_dtype, 16, False, False, False, False, DeviceCapability(*capability)
    )
    assert (why is not None) == refused
    assert "compute capability 8.9" in (why or "compute capability 8.9")


def test_full_graphs_of_decode_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = SparseMMMetadataBuilder
    monkeypatch.setattr(builder, "_cudagraph_support", AttentionCGSupport.ALWAYS)
    pruned = object.__new__(SparseMMSpec)
    assert builder.get_cudagraph_support(None, pruned) == AttentionCGSupport.UNIFORM_BATCH
    assert builder.get_cudagraph_support(None, object()) == AttentionCGSupport.ALWAYS
