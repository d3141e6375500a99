"""The CUDA backend's own decisions, with FlashAttention replaced by torch."""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, FP8, TOLERANCE, relative_error
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.attention import cuda as cuda_backend
from sparsemm_vllm.engine.attention.cuda import (
    SparseMMBackend,
    SparseMMImpl,
    SparseMMMetadataBuilder,
)
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.engine.worker.step import Step, capture_step, plan_step
from sparsemm_vllm.triton_kernels import reference, torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import Rows
from support.dense_metadata import dense_metadata

L, HKV, G, D, P, WINDOW = 2, 2, 2, 16, 8, 4
SCALE = 0.25
LAYOUT = CacheLayout(capacities=((0, 40), (9, 1)), window=WINDOW, base=10, pool_kernel=3)
PRUNED, SHORT = 61, 9  # prompt tokens: over and under window and base
PROMPT_BLOCKS = -(-PRUNED // P)
WIDTH = 16  # blocks of a request
MAX_REQUESTS = 6
LAYERS = {"layers.0": 0, "layers.1": 1}
HALF = torch.float16  # FlashAttention's; float32 goes elsewhere


@pytest.fixture(params=[torch_ops, triton_ops], ids=["torch", "triton"])
def ops(request: Any) -> ModuleType:
    return request.param  # type: ignore[no-any-return]


def make_state(ops: ModuleType, dtype: torch.dtype = HALF) -> SparseState:
    torch.manual_seed(0)
    heads = Heads(L, HKV * G, HKV, D, dtype)
    capacity = Capacity(MAX_REQUESTS, 256, 3, decode_queries=3)
    state = SparseState(LAYOUT, LAYOUT.slice_of(0, 0), heads, capacity, DEVICE)
    state.ops = ops
    cache = torch.randn(L, 1 + MAX_REQUESTS * WIDTH, HKV, P, 2 * D).to(DEVICE, dtype)
    cache[:, 0] = torch.nan  # the null block
    state.attach(PrunedCache(cache, LAYERS))
    return state


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def rows_of(common: CommonAttentionMetadata, requests: torch.Tensor) -> Rows:
    """What the kernels are told of a batch of vLLM's."""
    return Rows(common.block_table_tensor, common.query_start_loc, common.seq_lens, requests)


class Batch:
    """Requests ``(prompt tokens, tokens after the step, queries)``, by vLLM's own names.

    Row `i` has index ``MAX_REQUESTS - 1 - i``; `padded` rows belong to nobody.
    """

    def __init__(self, state: SparseState, rows: list[tuple[int, int, int]], padded: int = 0):
        self.state, self.rows = state, rows
        self.requests = np.array([MAX_REQUESTS - 1 - i for i in range(len(rows))])
        for request, (n, *_) in zip(self.requests, rows, strict=True):
            state.add(int(request), n)
        R = len(rows) + padded
        starts = np.zeros(R + 1, dtype=np.int64)
        starts[1:] = np.cumsum([queries for *_, queries in rows] + [0] * padded)
        self.starts = starts.tolist()
        self.seq_lens = [seq_len for _, seq_len, _ in rows] + [0] * padded
        blocks = 1 + torch.randperm(MAX_REQUESTS * WIDTH).reshape(MAX_REQUESTS, WIDTH)
        self.block_table = blocks[:R].int().to(DEVICE)
        self.block_table[len(rows) :] = 0
        self.step = plan_step(
            state, self.requests, starts, np.array(self.seq_lens), R if padded else None
        )
        for row, (_, seq_len, queries) in enumerate(rows):
            if self.is_pruned(row, seq_len - queries):  # others may have its prompt blocks by now
                freed = self.block_table[row, : (PRUNED - WINDOW) // P].long()
                state.cache.tensor[:, freed] = torch.nan

    def is_pruned(self, row: int, computed: int) -> bool:
        return self.rows[row][0] == PRUNED <= computed

    def common(self) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=int32(self.starts),
            query_start_loc_cpu=torch.tensor(self.starts, dtype=torch.int32),
            seq_lens=int32(self.seq_lens),
            num_reqs=len(self.seq_lens),
            num_actual_tokens=self.starts[-1],
            max_query_len=int(np.diff(self.starts).max()),
            max_seq_len=max(self.seq_lens),
            block_table_tensor=self.block_table,
            slot_mapping=torch.arange(self.starts[-1], device=DEVICE),
        )

    def prepare(self, common: CommonAttentionMetadata) -> None:
        T = common.num_actual_tokens
        self.step.prepare(
            torch.zeros(T, dtype=torch.int64, device=DEVICE),
            torch.zeros(T, dtype=torch.int64, device=DEVICE),
            rows_of(common, torch.from_numpy(self.requests).to(DEVICE)),
        )

    def expected(self, layer: int, query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Row by row: over what was kept where the prompt is pruned, else over all tokens."""
        out = torch.full_like(query, torch.nan, dtype=torch.float32)
        pages = self.state.pages
        for i, (_, seq_len, queries) in enumerate(self.rows):
            own, row = slice(self.starts[i], self.starts[i + 1]), self.block_table[i]
            given = query[own].float()
            if self.is_pruned(i, seq_len - queries):
                out[own] = reference.sparse_decode(
                    given,
                    cache,
                    layer,
                    row,
                    pages.lengths[self.requests[i], layer],
                    pages.first_pages[self.requests[i], layer],
                    40,
                    PRUNED - WINDOW,
                    PROMPT_BLOCKS,
                    LAYOUT.compact_blocks(PRUNED, P),
                    torch.tensor(seq_len, device=DEVICE),
                    seq_len,
                    SCALE,
                )
            else:
                out[own] = reference.dense_attention(given, cache[layer], row, seq_len, SCALE)
        return out

    def prune(self, layer: int, query: torch.Tensor, cache: torch.Tensor) -> None:
        """What each prompt that ends keeps, copied to its head pages."""
        for i, (n, seq_len, queries) in enumerate(self.rows):
            if n != PRUNED or seq_len != PRUNED:
                continue
            end, row = self.starts[i + 1], self.block_table[i]
            positions = torch.arange(n, device=DEVICE)
            keys = reference.read_tokens(cache[layer], row, positions, n, 0)[..., :D]
            window = query[end - WINDOW : end].transpose(0, 1)
            scores = reference.window_scores(window, keys, LAYOUT.pool_kernel, SCALE)
            lengths = self.state.pages.lengths[self.requests[i], layer]
            reference.compact_kv(
                cache,
                layer,
                row,
                reference.select_tokens(scores, lengths, int(lengths.max())),
                lengths,
                self.state.pages.first_pages[self.requests[i], layer],
                int(lengths.sum()),
                PROMPT_BLOCKS,
            )
            assert queries >= WINDOW


class Flash:
    """FlashAttention in torch; `built` and `attended` are what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[CommonAttentionMetadata] = []
        self.attended: list[cuda_backend.FlashAttentionMetadata] = []

        def build(builder: Any, prefix: int, given: Any, fast_build: bool = False) -> Any:
            self.built.append(given)
            return dense_metadata(builder, prefix, given, fast_build)

        def forward(
            impl: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, meta: Any, out: Any
        ) -> None:
            self.attended.append(meta)
            starts = meta.query_start_loc.tolist()
            assert len(query) == len(out) == starts[-1] == meta.num_actual_tokens
            for row, seq_len in enumerate(meta.seq_lens.tolist()):
                own = slice(starts[row], starts[row + 1])
                out[own] = reference.dense_attention(
                    query[own], cache, meta.block_table[row], seq_len, SCALE
                )

        monkeypatch.setattr(cuda_backend.FlashAttentionMetadataBuilder, "build", build)
        monkeypatch.setattr(cuda_backend.FlashAttentionImpl, "forward", forward)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    return Flash(monkeypatch)


def build(common: CommonAttentionMetadata, step: Step | None) -> Any:
    """The real builder's metadata."""
    builder = object.__new__(SparseMMMetadataBuilder)
    builder.step = step
    return builder.build(0, common)


def make_impl(kv_cache_dtype: str = "auto", sliding_window: int | None = None) -> SparseMMImpl:
    return SparseMMImpl(
        HKV * G, D, SCALE, HKV, sliding_window=sliding_window, kv_cache_dtype=kv_cache_dtype
    )


def attend(
    meta: Any, cache: torch.Tensor, layer: int, query: torch.Tensor, output: torch.Tensor
) -> None:
    """The real forward of a layer."""
    impl, name = make_impl(), f"layers.{layer}"
    key = value = query[:, :HKV]  # in the cache already
    impl.forward(SimpleNamespace(layer_name=name), query, key, value, cache[layer], meta, output)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return relative_error(actual, expected) < TOLERANCE[actual.dtype]


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


def lay_out(cache: torch.Tensor, layout: KVCacheLayout) -> torch.Tensor:
    """The same ``[L, B, Hkv, P, 2 * D]`` in another order in memory."""
    order = layout.stride_order
    inverse = sorted(range(5), key=order.__getitem__)
    return cache.permute(order).contiguous().permute(inverse)


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
