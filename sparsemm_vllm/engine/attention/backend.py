"""What SPARSEMM adds to a dense attention backend: prune, and attend to what was kept."""

from typing import Any

from vllm.v1.attention.backend import AttentionType

from sparsemm_vllm.engine.config import UnsupportedError
from sparsemm_vllm.names import NAME


class SparseBackendMixin:
    """Which layers and caches the backend takes; what it refuses, vLLM reports by name."""

    # A step's rows are divided by their keys, so a model must not write them and give none.
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_name() -> str:
        """The name of the enum member."""
        return NAME

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 8 elements, 16 bytes or 8 of fp8, up to what the registers hold."""
        return head_size % 8 == 0 and head_size <= 256

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors move blocks by prompt position; pruned requests have none."""
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Layers with a sliding window stay dense beside pruned ones."""
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Bidirectional image tokens would need another window score."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Causal only."""
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        """Sinks are not part of the sparse softmax."""
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        """No ALiBi of any kind."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """The kernels read one scale a tensor, FlashAttention would read one a head."""
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        """Context parallelism spreads a head's tokens over ranks."""
        return False

    @classmethod
    def supports_pcp(cls) -> bool:
        """The same for prefills."""
        return False

    @classmethod
    def supports_non_causal_dcp(cls) -> bool:
        """Neither of the two."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """A step is planned by the query lengths that the host knows."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Frees blocks on its own."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Not claimed."""
        return False


def refuse_variants(
    alibi_slopes: Any, logits_soft_cap: float | None, kv_sharing_target_layer_name: str | None
) -> None:
    """Refuse attention variants that the sparse part does not compute.

    Raises:
        UnsupportedError: naming the variant.
    """
    variants = {
        "ALiBi": alibi_slopes is not None,
        "a logit soft cap": bool(logits_soft_cap),
        "a KV cache shared between layers": kv_sharing_target_layer_name is not None,
    }
    used = [name for name, present in variants.items() if present]
    if used:
        raise UnsupportedError(f"SPARSEMM does not compute attention with {' and '.join(used)}")
