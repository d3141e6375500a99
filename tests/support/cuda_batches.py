"""Batches for the CUDA backend, what it should answer, and FlashAttention in torch."""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, relative_error
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.attention import cuda as cuda_backend
from sparsemm_vllm.engine.attention.cuda import SparseMMImpl, SparseMMMetadataBuilder
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.engine.worker.step import Step, plan_step
from sparsemm_vllm.triton_kernels import reference
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


def lay_out(cache: torch.Tensor, layout: KVCacheLayout) -> torch.Tensor:
    """The same ``[L, B, Hkv, P, 2 * D]`` in another order in memory."""
    order = layout.stride_order
    inverse = sorted(range(5), key=order.__getitem__)
    return cache.permute(order).contiguous().permute(inverse)
