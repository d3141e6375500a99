"""What SPARSEMM adds to a dense attention backend: prune, and attend to what was kept."""

from typing import Any

from typing_extensions import override
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from sparsemm_vllm.engine.config import UnsupportedError
from sparsemm_vllm.names import NAME


class SparseBackendMixin(AttentionBackend):
    """Which layers and caches the backend takes; what it refuses, vLLM reports by name.

    Stands before a backend that computes dense attention among the bases of a class.
    """

    # A step's rows are divided by their keys, so a model must not write them and give none.
    supports_kv_cache_update_bypass = False

    @staticmethod
    @override
    def get_name() -> str:
        """SPARSEMM's name in vLLM's enumeration of backends."""
        return NAME

    @classmethod
    @override
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 8 elements: 16 bytes, or 8 of fp8. At most 256: registers hold no more."""
        return head_size % 8 == 0 and head_size <= 256

    @classmethod
    @override
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Only decoders, also where the dense backend takes other layers."""
        return attn_type == AttentionType.DECODER

    @classmethod
    @override
    def supports_kv_connector(cls) -> bool:
        """No: connectors move blocks by prompt position, and pruned requests have none."""
        return False

    @classmethod
    @override
    def supports_sliding_window(cls) -> bool:
        """Yes: layers with a sliding window stay dense beside pruned ones."""
        return True

    @classmethod
    @override
    def supports_mm_prefix(cls) -> bool:
        """No: bidirectional image tokens would need another window score."""
        return False

    @classmethod
    @override
    def supports_non_causal(cls) -> bool:
        """No: the kernels mask by position."""
        return False

    @classmethod
    @override
    def supports_sink(cls) -> bool:
        """No: sinks are not part of the sparse softmax."""
        return False

    @classmethod
    @override
    def supports_alibi_sqrt(cls) -> bool:
        """No: the kernels add no ALiBi of any kind to the logits."""
        return False

    @classmethod
    @override
    def supports_per_head_quant_scales(cls) -> bool:
        """No: the kernels read one scale a tensor, where FlashAttention reads one a head."""
        return False

    @classmethod
    @override
    def supports_dcp(cls) -> bool:
        """No: context parallelism spreads a head's tokens over ranks."""
        return False

    @classmethod
    @override
    def supports_pcp(cls) -> bool:
        """No, for the same reason in prefills."""
        return False

    @classmethod
    @override
    def supports_non_causal_dcp(cls) -> bool:
        """No: neither of the two is supported."""
        return False

    @classmethod
    @override
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: a step is planned by the query lengths that the host knows."""
        return False

    @classmethod
    @override
    def supports_rswa(cls) -> bool:
        """No: it frees blocks on its own."""
        return False

    @classmethod
    @override
    def supports_batch_invariance(cls) -> bool:
        """No: work is spread over programs by the whole batch."""
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
