"""The model runner's small Triton kernels in torch, where they would be interpreted.

Triton's interpreter takes some ten milliseconds for each request and step in these, five times what
the bundled model takes itself. What stands here computes the same for the usual step; the rare ones
(random sampling, speculation, context parallelism) go to vLLM's function, as do all of them in a
vLLM whose function is not as in any release that SPARSEMM supports.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from sparsemm_vllm.engine.vllm_api import contract, hooks
from sparsemm_vllm.engine.vllm_api.signatures import argument

PAD_SLOT = -1


def _rows(lengths: torch.Tensor) -> torch.Tensor:
    """The row of each token, for rows of these lengths."""
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def _gather_block_tables(original: Callable[..., Any]) -> Callable[..., Any]:
    def gather_block_tables(
        self: Any,
        idx_mapping: torch.Tensor,
        num_reqs_padded: int,
        out: tuple[torch.Tensor, ...] | None = None,
        out_ptrs: torch.Tensor | None = None,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        requests, rows = len(idx_mapping), num_reqs_padded
        tables = out
        if tables is None:
            tables = tuple(self.input_block_tables)
            rows = max(rows, getattr(self, "_num_dirty_rows", 0))
            self._num_dirty_rows = requests
        request = idx_mapping.long()
        for group, (source, table) in enumerate(zip(self.block_tables, tables, strict=True)):
            table[:requests] = source.gpu[request]
            table[requests:rows] = 0
            # 0.33: the null block where a sliding window has passed, and no query looks.
            if num_computed_tokens is not None and (reach := int(self.sliding_window_reach[group])):
                passed = (num_computed_tokens[request] - reach).clamp(min=0)
                unseen = passed // self.block_sizes[group]
                table[:requests][torch.arange(table.shape[1]) < unseen[:, None]] = 0
        return tuple(table[:num_reqs_padded] for table in tables)

    return gather_block_tables


def _slot_mappings(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_slot_mappings(
        self: Any,
        idx_mapping: torch.Tensor,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        num_tokens_padded: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.cp_size != 1:
            arguments = (idx_mapping, query_start_loc, positions, num_tokens_padded, out)
            return original(self, *arguments)
        slots = self.slot_mappings if out is None else out
        row = _rows(query_start_loc[: len(idx_mapping) + 1].diff())
        request, position = idx_mapping.long()[row], positions[: len(row)]
        slots[:, len(row) :] = PAD_SLOT
        for group, size in enumerate(self.block_sizes):
            if not self.slot_mapping_enabled[group]:
                slots[group] = PAD_SLOT
                continue
            block = self.block_tables[group].gpu[request, position // size]
            slot = block.long() * size + position % size
            slots[group, : len(row)] = torch.where(request >= 0, slot, PAD_SLOT)
        return slots[:, :num_tokens_padded]

    return compute_slot_mappings


def _positions(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_pos_seq_lens(
        idx_mapping: torch.Tensor,
        query_start_loc: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        pos: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> None:
        requests = len(idx_mapping)
        start = query_start_loc[: requests + 1]
        computed, lengths = num_computed_tokens[idx_mapping.long()], start.diff()
        seq_lens[:requests] = computed + lengths
        seq_lens[requests:] = 0
        row = _rows(lengths)
        pos[: len(row)] = torch.arange(len(row)) + (computed - start[:-1])[row]

    return prepare_pos_seq_lens


def _sampled_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def combine_sampled_and_draft_tokens(
        input_ids: torch.Tensor,
        idx_mapping: torch.Tensor,
        last_sampled_tokens: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        prefill_len: torch.Tensor,
        draft_tokens: torch.Tensor,
        cu_num_logits: torch.Tensor,
        num_logits: int,
        num_new_sampled_tokens: int = 1,
    ) -> torch.Tensor:
        requests = len(idx_mapping)
        if num_logits != requests or num_new_sampled_tokens != 1:
            return original(
                input_ids, idx_mapping, last_sampled_tokens, query_start_loc, seq_lens, prefill_len,
                draft_tokens, cu_num_logits, num_logits, num_new_sampled_tokens,
            )  # fmt: skip
        last = query_start_loc[1 : requests + 1].long() - 1
        request = idx_mapping.long()
        decodes = seq_lens[:requests] > prefill_len[request]
        sampled = last_sampled_tokens.flatten()[request[decodes]]
        input_ids[last[decodes]] = sampled.to(input_ids.dtype)
        return last

    return combine_sampled_and_draft_tokens


def _update(original: Callable[..., Any]) -> Callable[..., Any]:
    def post_update(
        idx_mapping: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        last_sampled_tokens: torch.Tensor,
        output_bin_counts: torch.Tensor | None,
        sampled_tokens: torch.Tensor,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        all_token_ids: torch.Tensor,
        total_len: torch.Tensor,
        draft_tokens: torch.Tensor | None = None,
        draft_tokens_out: torch.Tensor | None = None,
    ) -> None:
        usual = query_start_loc is not None and sampled_tokens.shape[1] == 1
        if not usual or draft_tokens is not None or (idx_mapping < 0).any():
            drafts = () if draft_tokens is None else (draft_tokens, draft_tokens_out)
            original(
                idx_mapping, num_computed_tokens, last_sampled_tokens, output_bin_counts,
                sampled_tokens, num_sampled, num_rejected, query_start_loc, all_token_ids,
                total_len, *drafts,
            )  # fmt: skip
            return
        assert query_start_loc is not None
        request = idx_mapping.long()
        computed = query_start_loc[: len(request) + 1].diff() - num_rejected
        num_computed_tokens[request] += computed.to(num_computed_tokens.dtype)
        sampled = num_sampled > 0
        request, token = request[sampled], sampled_tokens[sampled, 0].long()
        last_sampled_tokens.view(-1)[request] = token.to(last_sampled_tokens.dtype)
        all_token_ids[request, total_len[request].long()] = token.to(all_token_ids.dtype)
        total_len[request] += 1
        if output_bin_counts is not None:
            output_bin_counts[request, token] += 1

    return post_update


def _greedy(original: Callable[..., Any]) -> Callable[..., Any]:
    logits_cache = argument(original, "logits_cache")

    def gumbel_sample(
        logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        temperature: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        inputs = logits, expanded_idx_mapping, temperature, *args
        drawn = temperature[expanded_idx_mapping.long()].any()
        if not drawn and logits_cache(*inputs, **kwargs) is None:
            return logits.argmax(-1)
        return original(*inputs, **kwargs)

    return gumbel_sample


def _top_k_top_p(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_top_k_top_p_triton(
        logits: torch.Tensor,
        k: torch.Tensor | None,
        p: torch.Tensor | None,
        mask_value: float = float("-inf"),
        *args: Any,  # 0.33: which rows need p, a hint for speed
        **kwargs: Any,
    ) -> torch.Tensor:
        if mask_value != float("-inf"):
            return original(logits, k, p, mask_value, *args, **kwargs)
        # The interpreter fails in vLLM's kernel: its program ids cannot be cast to int64.
        return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)

    return apply_top_k_top_p_triton


TWINS = {
    hooks.GATHER_BLOCK_TABLES: _gather_block_tables,
    hooks.SLOT_MAPPINGS: _slot_mappings,
    hooks.POSITIONS: _positions,
    hooks.SAMPLED_TOKENS: _sampled_tokens,
    hooks.POST_UPDATE: _update,
    hooks.GUMBEL_SAMPLE: _greedy,
    hooks.TOP_K_TOP_P: _top_k_top_p,
}


def install() -> None:
    """Put the twins in place, of the functions that are as in a supported release. Idempotent."""
    for hook, twin in TWINS.items():
        if contract.is_recorded(hook.symbol):
            hook.install(twin)
