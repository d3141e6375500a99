"""SPARSEMM on CUDA: vLLM's FlashAttention for dense rows and cache writes, sparse rows on top."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from sparsemm_vllm import patches
from sparsemm_vllm.sparse_attention import (
    SparseBackendMixin,
    forward_sparse,
    refuse_variants,
)
from sparsemm_vllm.step import Step


@dataclass
class SparseMMMetadata(FlashAttentionMetadata):
    """FlashAttention's metadata and what SPARSEMM does in the step.

    Attributes:
        step: none where layers are dense.
        sparse_seq_lens: tokens of each request after the step, ``[R]``; FlashAttention's are
            shortened for rows that it does not compute.
    """

    step: Step | None = None
    sparse_seq_lens: torch.Tensor | None = None


class SparseMMMetadataBuilder(FlashAttentionMetadataBuilder):
    """Decides once per step which rows FlashAttention computes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        patches.require_installed()
        super().__init__(*args, **kwargs)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """The sparse part is torch code whose shapes follow the batch: no full graphs yet.

        vLLM keeps piecewise graphs around it.
        """
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        step: Step | None = None,
    ) -> SparseMMMetadata:
        """The metadata of one step. Does not wait for the device."""
        common = common_attn_metadata
        seq_lens = common.seq_lens
        if step is not None and step.decodes and step.has_dense:
            # FlashAttention runs over all rows; let it read next to nothing for the sparse ones.
            sparse = torch.zeros(common.num_reqs, dtype=torch.bool)
            sparse[[row.batch_index for row in step.decodes]] = True
            sparse = sparse.to(seq_lens.device, non_blocking=True)
            short = torch.where(sparse, common.naive_query_lens().to(seq_lens.dtype), seq_lens)
            common = common.replace(seq_lens=short)
        dense = super().build(common_prefix_len, common, fast_build)
        return SparseMMMetadata(**vars(dense), step=step, sparse_seq_lens=seq_lens)


class SparseMMImpl(FlashAttentionImpl):
    """Write, attend, score, select, compact."""

    supports_dcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: Any = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **options: Any,
    ) -> None:
        refuse_variants(alibi_slopes, logits_soft_cap, kv_sharing_target_layer_name)
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **options,
        )
        self.supports_quant_query_input = False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Dense rows first, then the pruned ones, then the prompts that are complete now."""
        meta = attn_metadata
        step = meta.step if isinstance(meta, SparseMMMetadata) else None
        if step is None or step.has_dense:
            super().forward(
                layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale
            )
        if step is None:
            return output
        assert isinstance(meta, SparseMMMetadata)
        assert meta.sparse_seq_lens is not None
        forward_sparse(
            step,
            layer.layer_name,
            query,
            output,
            meta.block_table,
            meta.sparse_seq_lens,
            self.scale,
        )
        return output


class SparseMMBackend(SparseBackendMixin, FlashAttentionBackend):
    """SPARSEMM on CUDA."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_impl_cls() -> type[SparseMMImpl]:
        """The implementation."""
        return SparseMMImpl

    @staticmethod
    def get_builder_cls() -> type[SparseMMMetadataBuilder]:
        """The metadata builder."""
        return SparseMMMetadataBuilder
