"""The CUDA backend's own decisions, on CPU tensors, with FlashAttention replaced by torch."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparsemm_vllm import cuda_backend
from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.step import PrunedCache, RequestTable, plan_step
from sparsemm_vllm.triton_kernels.reference import dense_attention

L, HKV, G, D, P, WINDOW = 2, 2, 2, 16, 8, 4
SCALE = 0.25
LAYOUT = CacheLayout(capacities=((0, 40), (9, 1)), window=WINDOW, base=10)
PRUNED, SHORT = 61, 9  # prompt tokens: over and under window and base


def build(
    monkeypatch: pytest.MonkeyPatch, common: SimpleNamespace, step: Any
) -> cuda_backend.SparseMMMetadata:
    """The real builder's metadata; FlashAttention's part only copies what it is given."""

    def flash_build(self: Any, common_prefix_len: int, given: Any, fast_build: bool) -> Any:
        return cuda_backend.FlashAttentionMetadata(
            num_actual_tokens=given.num_actual_tokens,
            max_query_len=0,
            query_start_loc=given.query_start_loc,
            max_seq_len=0,
            seq_lens=given.seq_lens,
            block_table=given.block_table_tensor,
            slot_mapping=torch.empty(0),
        )

    monkeypatch.setattr(cuda_backend.FlashAttentionMetadataBuilder, "build", flash_build)
    builder = object.__new__(cuda_backend.SparseMMMetadataBuilder)
    return builder.build(0, common, step=step)


def attend(
    monkeypatch: pytest.MonkeyPatch, meta: Any, cache: torch.Tensor, query: torch.Tensor
) -> tuple[torch.Tensor, list[int]]:
    """The real forward of layer 0; returns its output and the tokens FlashAttention looked at."""
    looked: list[int] = []

    def flash_forward(self: Any, layer: Any, query: Any, *args: Any) -> None:
        given, output = args[3], args[4]
        starts = given.query_start_loc.tolist()
        for row, seq_len in enumerate(given.seq_lens.tolist()):
            own = slice(starts[row], starts[row + 1])
            looked.append(seq_len)
            output[own] = dense_attention(
                query[own], cache[0], given.block_table[row], seq_len, SCALE
            )

    monkeypatch.setattr(cuda_backend.FlashAttentionImpl, "forward", flash_forward)
    impl = object.__new__(cuda_backend.SparseMMImpl)
    impl.scale = SCALE
    output = torch.full((query.shape[0], HKV * G, D), torch.nan)
    layer = SimpleNamespace(layer_name="layers.0")
    impl.forward(layer, query, None, None, cache[0], meta, output)  # type: ignore[arg-type]
    return output, looked


def batch(table: RequestTable, prompts: list[int], seq_lens: list[int], queries: list[int]) -> Any:
    """A step of these requests, the first ones of the table, and vLLM's view of it."""
    for index, prompt_tokens in enumerate(prompts):
        table.add(index, prompt_tokens)
    starts = np.cumsum([0, *queries])
    step = plan_step(table, np.arange(len(prompts)), np.array(prompts), starts, np.array(seq_lens))
    common = SimpleNamespace(
        num_reqs=len(prompts),
        num_actual_tokens=int(starts[-1]),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table_tensor=torch.arange(1, 1 + 20 * len(prompts)).reshape(len(prompts), 20),
        naive_query_lens=lambda: torch.tensor(queries, dtype=torch.int32),
    )
    common.replace = lambda **changes: SimpleNamespace(**vars(common) | changes)
    return step, common


@pytest.fixture
def table() -> RequestTable:
    torch.manual_seed(0)
    cache = torch.randn(L, 70, HKV, P, 2 * D)
    layers = {"layers.0": 0, "layers.1": 1}
    own = LAYOUT.slice_of(0, 0)
    return RequestTable(PrunedCache(cache, layers, LAYOUT, own), max_num_reqs=4)


def test_mixed_batch(monkeypatch: pytest.MonkeyPatch, table: RequestTable) -> None:
    """A pruned row that decodes, a short one that decodes, a prompt that ends in this step."""
    seq_lens, queries = [PRUNED + 3, SHORT + 5, PRUNED], [1, 1, 30]
    step, common = batch(table, [PRUNED, SHORT, PRUNED], seq_lens, queries)
    cache = table.cache.tensor
    query = torch.randn(sum(queries), HKV * G, D)
    before = cache.clone()
    meta = build(monkeypatch, common, step)
    output, looked = attend(monkeypatch, meta, cache, query)

    assert looked == [1, SHORT + 5, PRUNED], "FlashAttention should skip the pruned row's cache"
    torch.testing.assert_close(meta.sparse_seq_lens, common.seq_lens)
    for row, own in ((1, slice(1, 2)), (2, slice(2, 32))):
        dense = dense_attention(
            query[own], before[0], common.block_table_tensor[row], seq_lens[row], SCALE
        )
        torch.testing.assert_close(output[own], dense)
    alone, solo = batch(table, [PRUNED], [PRUNED + 3], [1])
    expected, looked = attend(monkeypatch, build(monkeypatch, solo, alone), before, query[:1])
    assert looked == [], "nothing dense in this batch"
    torch.testing.assert_close(output[:1], expected)

    written = (before != cache).any(-1).any(-1).any(-1).any(0).nonzero().flatten().tolist()
    blocks = common.block_table_tensor[2]
    first = -(-PRUNED // P)
    compact = blocks[first : first + LAYOUT.compact_blocks(PRUNED, P)].tolist()
    assert set(written) <= set(compact)
    assert written, "the prompt that ended should have been pruned"


def test_layers_that_stay_dense(monkeypatch: pytest.MonkeyPatch, table: RequestTable) -> None:
    """Sliding-window layers of a mixed model, and CUDA graph capture, come without a step."""
    _, common = batch(table, [PRUNED], [PRUNED + 3], [1])
    meta = build(monkeypatch, common, None)
    before = table.cache.tensor.clone()
    _, looked = attend(monkeypatch, meta, table.cache.tensor, torch.randn(1, HKV * G, D))
    assert looked == [PRUNED + 3]
    assert torch.equal(before, table.cache.tensor)


def test_what_the_backend_takes() -> None:
    backend = cuda_backend.SparseMMBackend
    assert backend.get_name() == "SPARSEMM"
    assert not backend.supports_kv_connector()
    assert not backend.supports_mm_prefix()
    assert not backend.supports_sink()
    assert not backend.supports_kv_cache_dtype("fp8")
    assert not backend.get_impl_cls().supports_dcp
