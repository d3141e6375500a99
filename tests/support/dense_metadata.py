"""In place of FlashAttention's metadata builder, which is vLLM's matter and needs a GPU."""

from typing import Any


def dense_metadata(builder: Any, prefix: int, given: Any, fast_build: bool = False) -> Any:
    """The builder's `build`: a batch's metadata, without FlashAttention's own schedule."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    return FlashAttentionMetadata(
        num_actual_tokens=given.num_actual_tokens,
        max_query_len=given.max_query_len,
        query_start_loc=given.query_start_loc,
        max_seq_len=given.max_seq_len,
        seq_lens=given.seq_lens,
        block_table=given.block_table_tensor,
        slot_mapping=given.slot_mapping,
    )
