"""vLLM's batches on PyTorch's meta device, on which no tensor has values."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from support.no_waiting import META


def on_device(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=META)


def vllm_batch(starts: list[int], seq_lens: list[int]) -> Any:
    """vLLM's input batch of one row for each of the first requests."""
    rows, tokens = len(seq_lens), starts[-1]
    return SimpleNamespace(
        idx_mapping_np=np.arange(rows),
        idx_mapping=torch.arange(rows, dtype=torch.int32, device=META),
        query_start_loc_np=np.array(starts),
        query_start_loc=on_device(rows + 1),
        seq_lens=on_device(rows),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens),
        prefill_len_np=np.ones(rows, dtype=int),
        num_scheduled_tokens=np.diff(starts),
        num_reqs=rows,
        num_reqs_after_padding=rows,
        positions=torch.zeros(tokens, dtype=torch.int64, device=META),
    )


def vllm_common(starts: list[int], seq_lens: list[int]) -> CommonAttentionMetadata:
    rows, tokens = len(seq_lens), starts[-1]
    return CommonAttentionMetadata(
        query_start_loc=on_device(rows + 1),
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=on_device(rows),
        num_reqs=rows,
        num_actual_tokens=tokens,
        max_query_len=int(np.diff(starts).max()),
        max_seq_len=max(seq_lens),
        block_table_tensor=on_device(rows, 32),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=META),
    )
