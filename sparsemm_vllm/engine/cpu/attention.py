"""Attention on the CPU, in torch: dense for comparison, and SPARSEMM on top of it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from sparsemm_vllm.engine.attention.backend import SparseBackendMixin, refuse_variants
from sparsemm_vllm.engine.attention.forward import forward_sparse
from sparsemm_vllm.engine.vllm_api.compatibility import require_installed
from sparsemm_vllm.engine.worker.step import Step
from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.reference import dense_attention


@dataclass  # vLLM adds to that of layers with chunked attention
class TorchMetadata:
    """A step's batch; see `CommonAttentionMetadata`.

    Attributes:
        query_start: first query of each request and the end of the last, ``[R + 1]``, on the host.
        seq_lens: tokens of each request after the step, int32 ``[R]``.
        block_table: block numbers of each request, int32 ``[R, max_blocks]``.
        step: plan of what SPARSEMM does in it; none where layers are dense.
        dense_rows: rows that attend to all of their tokens.
    """

    query_start: list[int]
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    step: Step | None
    dense_rows: list[int]


class TorchMetadataBuilder(AttentionMetadataBuilder[TorchMetadata]):
    """Copies what attention needs of a batch."""

    step: Step | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # abstract in vLLM's
        super().__init__(*args, **kwargs)

    @override
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TorchMetadata:
        """Lists instead of launch parameters: rows are computed one after the other."""
        common, step = common_attn_metadata, self.step
        dense = range(common.num_reqs)
        if step is not None:
            dense = dense[step.short_rows :]
        return TorchMetadata(
            query_start=common.query_start_loc_cpu.tolist(),
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            step=step,
            dense_rows=[row for row in dense if step is None or row not in step.pruned_rows],
        )


class TorchAttentionImpl(AttentionImpl[TorchMetadata]):
    """Attention over the paged cache: dense, and what SPARSEMM adds in steps that have it."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **options: Any,
    ) -> None:
        refuse_variants(alibi_slopes, logits_soft_cap, kv_sharing_target_layer_name)
        if options:
            raise NotImplementedError(f"attention options {', '.join(options)}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values ``[T, Hkv, D]`` to their slots; a negative slot is none."""
        page_size = kv_cache.shape[2]
        tokens = slot_mapping.shape[0]
        written = slot_mapping >= 0
        slots = slot_mapping[written]
        key, value = key[:tokens], value[:tokens]
        if is_quantized_kv_cache(self.kv_cache_dtype):
            key, value = quantize(key, layer._k_scale), quantize(value, layer._v_scale)
        kv = torch.cat([key, value], -1)[written]
        kv_cache[slots // page_size, :, slots % page_size] = kv.to(kv_cache.dtype)

    @override
    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TorchMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of this step's queries, row by row in torch, into `output` ``[T, Hq, D]``."""
        if attn_metadata is None:  # vLLM profiles memory
            return output.fill_(0)
        with watch_cache(attn_metadata, layer.layer_name):
            self._attend(layer, query, kv_cache, attn_metadata, output)
        return output

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: TorchMetadata,
        output: torch.Tensor,
    ) -> None:
        """Dense rows first, then what SPARSEMM adds."""
        scale, v_scale = self.scale, None
        if is_quantized_kv_cache(self.kv_cache_dtype):
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
            scale, v_scale = scale * float(layer._k_scale), layer._v_scale
        for row in meta.dense_rows:
            queries = slice(meta.query_start[row], meta.query_start[row + 1])
            if queries.start == queries.stop:
                continue
            out = dense_attention(
                query[queries],
                kv_cache,
                meta.block_table[row],
                int(meta.seq_lens[row]),
                scale,
                self.sliding_window,
            )
            output[queries] = out if v_scale is None else out * v_scale
        if meta.step is not None:
            forward_sparse(meta.step, layer, query, output, meta.block_table, self.scale)


def watch_cache(meta: TorchMetadata, layer_name: str) -> AbstractContextManager[Any]:
    """A context in which every slot that is read is checked, if `poison_freed` is on.

    Kernels of ours, which tests interpret here, read unseen.

    Args:
        meta: metadata of the step's batch.
        layer_name: name of the layer in vLLM.
    """
    step = meta.step
    if step is None or step.state.poison is None or step.state.ops is not torch_ops:
        return nullcontext()
    return step.state.poison.watch(step.state.cache.layers[layer_name], meta.block_table)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Bytes of ``x / scale`` in fp8 (e4m3), saturated as on the GPU."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)


class TorchAttentionBackend(AttentionBackend):
    """Dense attention in torch: the baseline where there is no GPU."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]
    forward_includes_kv_cache_update = False

    @staticmethod
    @override
    def get_name() -> str:
        """vLLM's name for attention on the CPU, which it looks up in its enumeration."""
        return "CPU_ATTN"

    @classmethod
    @override
    def supports_sliding_window(cls) -> bool:
        """Yes: rows are masked by position."""
        return True

    @staticmethod
    @override
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any: tokens are read one by one through the block table."""
        return [MultipleOf(1)]

    @staticmethod
    @override
    def get_impl_cls() -> type[TorchAttentionImpl]:
        """`TorchAttentionImpl`: dense attention, and what SPARSEMM adds."""
        return TorchAttentionImpl

    @staticmethod
    @override
    def get_builder_cls() -> type[TorchMetadataBuilder]:
        """`TorchMetadataBuilder`, for steps in which SPARSEMM may be absent."""
        return TorchMetadataBuilder


class SparseMMMetadataBuilder(TorchMetadataBuilder):
    """The same, in a process where SPARSEMM is installed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_installed()
        super().__init__(*args, **kwargs)


class SparseMMBackend(SparseBackendMixin, TorchAttentionBackend):
    """SPARSEMM on the CPU: the same attention, with steps that prune."""

    @staticmethod
    @override
    def get_builder_cls() -> type[SparseMMMetadataBuilder]:
        """`SparseMMMetadataBuilder`, which asks for SPARSEMM to be installed."""
        return SparseMMMetadataBuilder
