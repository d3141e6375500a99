"""Compiles the kernels at startup."""

import torch

from sparsemm_vllm.engine.worker.state import SparseState
from sparsemm_vllm.engine.worker.step import Step
from sparsemm_vllm.triton_kernels.batch import Prompts, Rows
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch
from sparsemm_vllm.triton_kernels.occupancy import resident_programs


def warm_up(state: SparseState, dtype: torch.dtype, block_table: torch.Tensor) -> None:
    """Launch what serving launches once, so that nothing is compiled when a request needs it.

    Prunes prompts that keep nothing, in the null block, and attends to nothing.

    Args:
        state: requests and memory of this rank; the cache is attached, no request runs yet.
        dtype: type of the queries.
        block_table: block table of vLLM's, int32 ``[max_requests, max_blocks]``, all null blocks.
    """
    ops, workspace, heads, cache = state.ops, state.workspace, state.heads, state.cache.tensor
    window, pool_kernel = state.layout.window, state.layout.pool_kernel
    device = workspace.scores.device
    query = torch.zeros(max(window, 64), heads.Hq, heads.D, dtype=dtype, device=device)
    scale = torch.ones(1, device=device) if cache.element_size() == 1 else None
    longest = min(workspace.capacity, block_table.shape[1] * state.page_size)
    for scores in (1024, 2048, 4096, 8192):  # select_tokens has a kernel for each
        n = min(window + scores, longest)
        prompts = Prompts.pack([(0, 0, window, n)], 0, device)
        rest = prompts, workspace
        ops.window_scores(query, cache[0], block_table, *rest, window, pool_kernel, 1.0, scale)
        ops.select_tokens(*rest, state.pages.lengths[:, 0], window)
        ops.compact_kv(cache, 0, block_table, *rest, state.pages)
        if state.pages.page_units is not None:
            ops.list_pages(cache, block_table, prompts, state.pages)
    slots = torch.full((1,), -1, dtype=torch.int64, device=device)
    zero = torch.zeros(2, dtype=torch.int32, device=device)
    rows = Rows(block_table, zero, zero, zero[:1].long())
    for batch in _decode_batches(state):
        step = Step(state, 1, moves_slots=True, decodes=[batch])
        step.prepare(slots, slots, rows)
        kernel = ops.sparse_decode(query, cache, 0, block_table, batch, query, 1.0, scale, scale)
        if kernel is not None:
            state.spread(batch.block_m, resident_programs(kernel, device))


def _decode_batches(state: SparseState) -> list[DecodeBatch]:
    """A row for each size of query tiles, among the long rows and the short ones.

    Both have sizes that the other has too, but their buffers are sized otherwise, and Triton
    compiles numbers that divide by 16 apart.
    """
    end = state.max_decode_queries + 1
    # 64 queries more fill the largest tile, whatever the head count.
    long = [state.long_decode_batch(0, queries) for queries in range(end, end + 64)]
    short = [state.decode_batch(0, 1, queries) for queries in range(1, end)]
    each = ({batch.block_q: batch for batch in batches}.values() for batches in (long, short))
    return [batch for batches in each for batch in batches]
