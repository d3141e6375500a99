"""Reads recorded attention out of vLLM's workers."""

from typing import Any

import numpy as np


class AttentionReader:
    """What the profiler adds to vLLM's worker class (`worker_extension_cls`)."""

    model_runner: Any

    def read_attention(self, rows: int) -> tuple[list[int], int, int, bytes]:
        """See `SparseMMModelState.read_attention`."""
        return self.model_runner.model_state.read_attention(rows)


def gather_attention(llm: Any, rows: int, num_layers: int, num_query_heads: int) -> np.ndarray:
    """The first recorded rows of all ranks' heads, which the workers then forget.

    Returns:
        Positions, int32 ``[L, rows, Hq]``; -1 for what was not recorded: layers that are not
        pruned, rows that no query was written to.
    """
    keys = np.full((num_layers, rows, num_query_heads), -1, dtype=np.int32)
    for layers, first, heads, data in llm.collective_rpc("read_attention", args=(rows,)):
        of_rank = np.frombuffer(data, dtype=np.int32).reshape(len(layers), rows, heads)
        keys[layers, :, first : first + heads] = of_rank
    return keys
