"""SPARSEMM on CUDA: dense prefill as vLLM computes it, everything else in our kernels."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.triton_unified_attention import unified_attention
from vllm.v1.kv_cache_interface import get_kv_quant_mode, is_quantized_kv_cache
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparsemm_vllm.engine.attention.backend import SparseBackendMixin, refuse_variants
from sparsemm_vllm.engine.attention.forward import forward_sparse, kv_scales
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.vllm_api.compatibility import require_installed
from sparsemm_vllm.engine.worker.step import Step
from sparsemm_vllm.triton_kernels.batch import to_device


@dataclass
class SparseMMMetadata:
    """A step's batch: decode rows first, then the rows that are prefilled.

    Attributes:
        step: plan of what SPARSEMM does in it.
        block_table: block numbers of each row, int32 ``[R, max_blocks]``.
        dense: batch without the decode rows; none if there are no others.
        dense_tokens: range of the dense rows' queries in the step's.
    """

    step: Step
    block_table: torch.Tensor
    dense: FlashAttentionMetadata | None
    dense_tokens: slice


class SparseMMMetadataBuilder(FlashAttentionMetadataBuilder):
    """Divides a step's rows between the decode kernel and dense attention."""

    step: Step | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_installed()
        super().__init__(*args, **kwargs)
        # FlashAttention 3 schedules its rows ahead, and fails for types that it does not compute.
        if not _flash_attends(self.model_config.dtype, self.cache_config.cache_dtype):
            self.aot_schedule = False

    @classmethod
    @override
    def get_cudagraph_support(
        cls, vllm_config: Any, kv_cache_spec: Any, *args: Any, **kwargs: Any
    ) -> AttentionCGSupport:
        """Full graphs for decode batches of pruned layers; piecewise graphs for the others.

        Layers that stay dense keep what FlashAttention supports.
        """
        if isinstance(kv_cache_spec, SparseMMSpec):
            return AttentionCGSupport.UNIFORM_BATCH
        return super().get_cudagraph_support(vllm_config, kv_cache_spec, *args, **kwargs)

    @override
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> SparseMMMetadata | FlashAttentionMetadata:
        """FlashAttention's metadata for the dense rows only, and the step beside it.

        Layers without a step get FlashAttention's metadata as it is. Does not wait for the device.
        """
        common, step = common_attn_metadata, self.step
        if step is None:  # layers that stay dense, batches that stand for none
            return super().build(common_prefix_len, common, *args, **kwargs)
        first = step.short_rows
        dense, first_token = None, common.num_actual_tokens
        if first < common.num_reqs:
            first_token = int(common.query_start_loc_cpu[first])
            dense = super().build(0, _dense_part(common, step, first_token), *args, **kwargs)
        return SparseMMMetadata(
            step, common.block_table_tensor, dense, slice(first_token, common.num_actual_tokens)
        )


def _flash_attends(dtype: torch.dtype, kv_cache_dtype: str) -> bool:
    """Whether FlashAttention computes dense rows: not float32, nor bytes beside wider queries.

    Args:
        dtype: type of the queries.
        kv_cache_dtype: name of the cache's type in vLLM.
    """
    return dtype != torch.float32 and not is_quantized_kv_cache(kv_cache_dtype)


def _dense_part(
    common: CommonAttentionMetadata, step: Step, first_token: int
) -> CommonAttentionMetadata:
    """The batch without its decode rows."""
    first = step.short_rows
    # In memory of its own, which is aligned: Triton compiles another kernel for what is not.
    seq_lens = common.seq_lens[first:].clone()
    if step.pruned_rows:
        # The decode kernel computes these, whose prompt blocks are gone: read next to nothing.
        pruned = torch.zeros(len(seq_lens), dtype=torch.bool)
        pruned[[row - first for row in step.pruned_rows]] = True
        query_lens = common.query_start_loc[first:].diff().to(seq_lens.dtype)
        seq_lens = torch.where(to_device(pruned, seq_lens.device), query_lens, seq_lens)
    return common.replace(
        query_start_loc=common.query_start_loc[first:] - first_token,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - first_token,
        seq_lens=seq_lens,
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - first_token,
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[first_token:],
    )


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
        *args: Any,
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
            "auto",  # FlashAttention never sees a quantised cache
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            *args,
            **options,
        )
        self.kv_cache_dtype = kv_cache_dtype
        self.supports_quant_query_input = False

    @override
    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """FlashAttention for the dense rows, then the decode rows, then the prompts to prune."""
        meta = attn_metadata
        if not isinstance(meta, SparseMMMetadata):
            self._attend_dense(layer, query, key, value, kv_cache, meta, output)
            return output
        if meta.dense is not None:
            own = meta.dense_tokens
            self._attend_dense(
                layer, query[own], key[own], value[own], kv_cache, meta.dense, output[own]
            )
        forward_sparse(meta.step, layer, query, output, meta.block_table, self.scale)
        return output

    def _attend_dense(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: FlashAttentionMetadata | None,
        output: torch.Tensor,
    ) -> None:
        """FlashAttention, or vLLM's Triton kernel for what FlashAttention does not take."""
        if meta is None or _flash_attends(query.dtype, self.kv_cache_dtype):
            super().forward(layer, query, key, value, kv_cache, meta, output)
            return
        if is_quantized_kv_cache(self.kv_cache_dtype):
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        shape = (meta.query_start_loc.shape[0] - 1, self.num_kv_heads)
        k_scale, v_scale = kv_scales(layer, kv_cache.dtype)
        tokens = meta.num_actual_tokens
        unified_attention(
            q=query[:tokens],
            k=key_cache,
            v=value_cache,
            out=output[:tokens],
            cu_seqlens_q=meta.query_start_loc,
            max_seqlen_q=meta.max_query_len,
            seqused_k=meta.seq_lens,
            max_seqlen_k=meta.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=self.sliding_window,
            block_table=meta.block_table,
            softcap=0,
            q_descale=None,
            k_descale=None if k_scale is None else k_scale.expand(shape),
            v_descale=None if v_scale is None else v_scale.expand(shape),
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
        )

    def warm_up_dense(self, layer: Any, dtype: torch.dtype, block_table: torch.Tensor) -> None:
        """Compile the kernel for dense rows, if it is vLLM's Triton kernel.

        Reads a token of the null block. Triton compiles numbers of rows apart that are 1, divide by
        16, or neither.

        Args:
            layer: attention layer of vLLM's, with its cache.
            dtype: type of the queries.
            block_table: block table of the layer's group, int32 ``[max_requests, max_blocks]``;
                only its width and its device count.
        """
        if _flash_attends(dtype, self.kv_cache_dtype):
            return
        device = block_table.device
        for rows in (1, 2, 16):
            meta = FlashAttentionMetadata(
                num_actual_tokens=rows,
                max_query_len=2,  # a bound: of one query, vLLM might take it for a decode
                query_start_loc=torch.arange(rows + 1, dtype=torch.int32, device=device),
                max_seq_len=1,
                seq_lens=torch.ones(rows, dtype=torch.int32, device=device),
                block_table=torch.zeros(
                    rows, block_table.shape[1], dtype=torch.int32, device=device
                ),
                slot_mapping=torch.full((rows,), -1, device=device),
            )
            query = torch.zeros(rows, self.num_heads, self.head_size, dtype=dtype, device=device)
            output = torch.empty_like(query)
            self._attend_dense(layer, query, query, query, layer.kv_cache, meta, output)


class SparseMMBackend(SparseBackendMixin, FlashAttentionBackend):
    """SPARSEMM on CUDA."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    @override
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """All of FlashAttention's list. It never sees an fp8 cache, so it need not support one."""
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    @override
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All layouts; first the one in which a head's tokens of a block lie side by side.

        The decode kernel reads such head pages. ``VLLM_KV_CACHE_LAYOUT`` chooses another layout.
        """
        preferred = KVCacheLayout.LBHNC
        return preferred, *(layout for layout in KVCacheLayout if layout != preferred)

    @classmethod
    @override
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Why the device cannot do it; None if it can. Asks nothing but fp8 conversion of it."""
        quantized = kv_cache_dtype is not None and is_quantized_kv_cache(kv_cache_dtype)
        if quantized and device_capability < DeviceCapability(8, 9):
            return "an fp8 KV cache needs compute capability 8.9: older GPUs do not convert e4m3"
        return None

    @staticmethod
    @override
    def get_impl_cls() -> type[SparseMMImpl]:
        """`SparseMMImpl`, which prunes."""
        return SparseMMImpl

    @staticmethod
    @override
    def get_builder_cls() -> type[SparseMMMetadataBuilder]:
        """`SparseMMMetadataBuilder`, which divides the rows."""
        return SparseMMMetadataBuilder
