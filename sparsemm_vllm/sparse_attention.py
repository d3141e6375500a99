"""What SPARSEMM adds to a dense attention backend: prune, and attend to what was kept."""

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType

from sparsemm_vllm.plugin import NAME
from sparsemm_vllm.step import Step
from sparsemm_vllm.support import UnsupportedError
from sparsemm_vllm.triton_kernels.reference import (
    compact_kv,
    read_tokens,
    select_tokens,
    sparse_decode,
    window_scores,
)


class SparseBackendMixin:
    """Which layers and caches the backend takes; what it refuses, vLLM reports by name."""

    @staticmethod
    def get_name() -> str:
        """The name of the enum member."""
        return NAME

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


def prune(
    step: Step,
    layer_name: str,
    query: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
) -> None:
    """Score, select and compact the prompts that this step completes.

    Args:
        step: this step.
        layer_name: of the attention layer.
        query: the step's queries, ``[T, Hq, D]``.
        block_table: ``[R, max_blocks]``.
        scale: of the attention logits.
    """
    table, cache = step.table, step.table.cache
    layout, layer = cache.layout, cache.layers[layer_name]
    for row in step.prunes:
        blocks = block_table[row.batch_index]
        end = row.query.stop
        window_queries = query[end - layout.window : end].transpose(0, 1)
        positions = torch.arange(row.prompt_tokens, device=query.device)
        kv = read_tokens(cache.tensor[layer], blocks, positions, row.prompt_blocks, 0)
        keys = kv[..., : query.shape[2]]
        scores = window_scores(window_queries, keys, layout.pool_kernel, scale)
        lengths = table.lengths[row.table_index, layer]
        longest = int(table.longest[row.table_index, layer])
        kept = select_tokens(scores, lengths, longest)
        if table.recorder is not None:
            request_id = table.request_ids[row.table_index]
            table.recorder.add(request_id, kept, lengths, row.prompt_tokens)
        compact_kv(
            cache.tensor,
            layer,
            blocks,
            kept,
            lengths,
            table.first_pages[row.table_index, layer],
            int(table.kept[row.table_index, layer]),
            row.prompt_blocks,
        )


def attend_pruned(
    step: Step,
    layer_name: str,
    query: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> None:
    """Attention of the rows whose prompt is pruned, into their rows of `output` ``[T, Hq, D]``."""
    table, cache = step.table, step.table.cache
    layer = cache.layers[layer_name]
    for row in step.decodes:
        output[row.query] = sparse_decode(
            query[row.query],
            cache.tensor,
            layer,
            block_table[row.batch_index],
            table.lengths[row.table_index, layer],
            table.first_pages[row.table_index, layer],
            int(table.longest[row.table_index, layer]),
            row.prompt_tokens - cache.layout.window,
            row.prompt_blocks,
            row.compact_blocks,
            seq_lens[row.batch_index],
            row.max_seq_len,
            scale,
        )


def forward_sparse(
    step: Step,
    layer_name: str,
    query: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> None:
    """What follows the dense rows: the pruned rows, then the prompts that are complete now.

    Args:
        step: this step.
        layer_name: of the attention layer.
        query: the step's queries, ``[T, Hq, D]``.
        output: ``[T, Hq, D]``; the pruned rows are written.
        block_table: ``[R, max_blocks]``.
        seq_lens: tokens of each request after the step, int32 ``[R]``.
        scale: of the attention logits.
    """
    attend_pruned(step, layer_name, query, output, block_table, seq_lens, scale)
    prune(step, layer_name, query, block_table, scale)
