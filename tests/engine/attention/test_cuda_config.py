"""The CUDA backend in vLLM's real configuration, as far as it goes without a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, get_kv_quant_mode
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.attention import cuda as cuda_backend
from sparsemm_vllm.engine.attention.cuda import SparseMMBackend, SparseMMMetadataBuilder
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.engine.worker.step import plan_step
from support.configs import build, save
from support.tiny import HEAD_SIZE, KV_HEADS, QUERY_HEADS, skewed_profile, text_config

P, WINDOW = 16, 8
LAYOUT = CacheLayout.from_scores(skewed_profile().tensor(), KV_HEADS, 40, WINDOW)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), text_config(), "LlamaForCausalLM")


class Schedules:
    """FlashAttention 3's scheduler as the library behaves: `types` are those it was asked for."""

    # Source: the library in vLLM's wheel, hopper/flash_api.cpp, which was called without a GPU.
    TAKEN = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)

    def __init__(self) -> None:
        self.types: list[torch.dtype] = []

    def __call__(self, *, qkv_dtype: torch.dtype, batch_size: int, **_: Any) -> torch.Tensor:
        self.types.append(qkv_dtype)
        if qkv_dtype not in self.TAKEN:
            raise RuntimeError("FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
        return torch.ones(1 + 4 * batch_size, dtype=torch.int32)


@pytest.fixture
def schedules(monkeypatch: pytest.MonkeyPatch) -> Schedules:
    """Of a GPU with FlashAttention 3, compute capability 9.0."""
    made = Schedules()
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *_, **__: 3)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", made, raising=False)
    monkeypatch.setattr(cuda_backend, "require_installed", lambda: None)
    return made


def make_builder(config: VllmConfig, dtype: torch.dtype, cache: str) -> SparseMMMetadataBuilder:
    """vLLM's builder under ours, for full CUDA graphs."""
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.max_cudagraph_capture_size = 8
    spec = SparseMMSpec(
        block_size=P,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=dtype if cache == "auto" else torch.uint8,
        kv_quant_mode=get_kv_quant_mode(cache),
        layout=LAYOUT,
    )
    with set_current_vllm_config(config):
        return SparseMMMetadataBuilder(spec, ["layers.0"], config, CPU)


def batch(n: int) -> CommonAttentionMetadata:
    """A prompt of `n` tokens that ends in this step."""
    starts = torch.tensor([0, n], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=starts[1:],
        num_reqs=1,
        num_actual_tokens=n,
        max_query_len=n,
        max_seq_len=n,
        block_table_tensor=torch.zeros(1, 64, dtype=torch.int32),
        slot_mapping=torch.zeros(n, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("dtype", "cache", "scheduled"),
    [
        ("bfloat16", "auto", True),
        ("float16", "auto", True),
        ("float32", "auto", False),
        ("bfloat16", "fp8", False),
        ("float16", "fp8_e4m3", False),
        ("float32", "fp8", False),
    ],
)
def test_flash_attention_schedules_what_it_computes(
    llama: Path, schedules: Schedules, dtype: str, cache: str, scheduled: bool
) -> None:
    """Real prompts, and batches without a step, as they are when piecewise graphs are captured."""
    config = build(llama, dtype=dtype, kv_cache_dtype=cache)
    builder = make_builder(config, getattr(torch, dtype), cache)
    heads = Heads(LAYOUT.slice_of(0, 0)[0].stop, QUERY_HEADS, KV_HEADS, HEAD_SIZE, torch.float32)
    state = SparseState(LAYOUT, LAYOUT.slice_of(0, 0), heads, Capacity(2, 256, 2), CPU)
    state.attach(PrunedCache(torch.empty(heads.L, 1, KV_HEADS, P, 2 * HEAD_SIZE), {}))
    state.add(0, 100)
    dense: Any = builder.build(0, batch(20))
    builder.step = plan_step(state, np.array([0]), np.array([0, 100]), np.array([100]))
    pruned: Any = builder.build(0, batch(100))
    for meta in (dense, pruned.dense):
        assert isinstance(meta, cuda_backend.FlashAttentionMetadata)
        assert (meta.scheduler_metadata is not None) == scheduled
    assert len(schedules.types) == 2 * scheduled


def test_layers_with_chunks_stay_dense(llama: Path, schedules: Schedules) -> None:
    """Llama 4: vLLM builds such a layer's metadata around ours, of one row for each chunk."""
    config = build(llama, dtype="bfloat16")
    backend = create_chunked_local_attention_backend(SparseMMBackend, 2 * P)
    assert backend.get_name() == SparseMMBackend.get_name()
    spec = ChunkedLocalAttentionSpec(
        block_size=P,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.bfloat16,
        attention_chunk_size=2 * P,
    )
    with set_current_vllm_config(config):
        builder = backend.get_builder_cls()(spec, ["layers.0"], config, CPU)
    assert builder.get_cudagraph_support(config, spec) == AttentionCGSupport.NEVER
    metadata: Any = builder.build(0, batch(100))
    assert isinstance(metadata, cuda_backend.FlashAttentionMetadata)
    assert metadata.query_start_loc.tolist() == [0, 32, 64, 96, 100]
    assert metadata.seq_lens.tolist() == [32, 32, 32, 4]
    assert metadata.block_table.shape == (4, 2)


@pytest.mark.parametrize(
    ("requested", "chosen"),
    [
        (None, "LBHNC"),
        ("LBNHC", "LBNHC"),
        ("NHD", "LBNHC"),  # vLLM's older names
        ("HND", "LBHNC"),
        ("BLHNC", "BLHNC"),
    ],
)
def test_a_heads_page_is_contiguous_unless_another_layout_is_asked_for(
    llama: Path, monkeypatch: pytest.MonkeyPatch, requested: str | None, chosen: str
) -> None:
    """As the engine core resolves what its workers report."""
    # The variable itself is read once, and an engine in this process may have read it.
    monkeypatch.setattr("vllm.envs.VLLM_KV_CACHE_LAYOUT", requested, raising=False)
    config = build(llama)
    layouts = get_supported_kv_cache_layouts([SparseMMBackend, SparseMMBackend])
    assert set(layouts) == set(KVCacheLayout)
    layout = resolve_kv_cache_layout(config, [[layout.name for layout in layouts]])
    assert layout.name == config.cache_config.kv_cache_layout == chosen


def test_models_give_the_backend_their_keys() -> None:
    """vLLM 0.33: with FlashAttention, some write keys themselves and call attention without."""
    assert not SparseMMBackend.supports_kv_cache_update_bypass


def test_vllms_own_kernels_take_every_layout() -> None:
    """Those that write the cache and compute dense rows: FlashAttention's."""
    assert flash_attn.FlashAttentionBackend.supported_kv_cache_layouts() is None
