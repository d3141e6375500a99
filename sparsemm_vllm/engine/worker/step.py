"""What one step does to each request: decided on the host, once per step.

Knows nothing of vLLM; positions that only the device knows stay there.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from sparsemm_vllm.engine.worker.probes.knockout import Knockout
from sparsemm_vllm.engine.worker.state import SparseState
from sparsemm_vllm.triton_kernels.batch import Prompts, QueryTiles, Rows, columns
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch


@dataclass(frozen=True)
class Step:
    """A step's batch, sorted by what SPARSEMM does with each request.

    Attributes:
        state: requests and memory of this rank, which outlive the step.
        short_rows: number of leading rows that the decode kernel computes, pruned or not.
        pruned_rows: later rows that attend to a pruned prompt.
        moves_slots: flag, true if generated tokens of any row lie behind compact blocks.
        max_query_len: queries of the row that has most.
        decodes: rows for the decode kernel: the short ones, then each of the pruned ones.
        prunes: prompts that this step completes, as many at a time as the workspace holds.
        recorded: queries whose attention is recorded; none if there are none.
        knockouts: queries that one head keeps only the window for.
    """

    state: SparseState
    short_rows: int
    pruned_rows: list[int] = field(default_factory=list)
    moves_slots: bool = False
    max_query_len: int = 1
    decodes: list[DecodeBatch] = field(default_factory=list)
    prunes: list[Prompts] = field(default_factory=list)
    recorded: QueryTiles | None = None
    knockouts: list[Knockout] = field(default_factory=list)

    def prepare(self, slots: torch.Tensor, positions: torch.Tensor, rows: Rows) -> None:
        """Correct the slots of generated tokens and schedule the decode rows, on the device.

        Args:
            slots: cache slot of each token of the step, int64 ``[T]``; changed in place.
            positions: position of each token in its request, int64 ``[T]``.
            rows: rows of the step's batch.
        """
        state = self.state
        if self.moves_slots:
            state.ops.correct_slots(
                slots, positions, rows, state.pages, state.page_size, self.max_query_len
            )
        if state.pages.page_units is not None:
            for prompts in self.prunes:
                state.ops.list_pages(state.cache.tensor, rows.block_table, prompts, state.pages)
        for batch in self.decodes:
            state.ops.schedule_decode(
                batch, state.pages, state.layout.window, state.page_size, rows
            )


def plan_step(
    state: SparseState,
    requests: np.ndarray,
    query_start: np.ndarray,
    max_seq_lens: np.ndarray,
    rows: int | None = None,
) -> Step:
    """Sort a batch's requests.

    Args:
        state: requests and memory of this rank.
        requests: index of each request, ``[R]``.
        query_start: first query of each request, and the end of the last, ``[>= R + 1]``.
        max_seq_lens: bound of each request's tokens after the step, ``[>= R]``; exact for rows
            that compute a prompt.
        rows: rows of the batch, if it is padded for a CUDA graph.

    Raises:
        RuntimeError: if a prompt's last chunk does not hold the window's queries.
    """
    R = len(requests)
    query_lens = np.diff(query_start[: R + 1])
    n = state.prompt_tokens[requests]
    pruned = state.compact_blocks[requests] > 0
    ends = pruned & (max_seq_lens[:R] == n)
    decodes = pruned & (max_seq_lens[:R] - query_lens >= n)

    is_long = query_lens > state.max_decode_queries
    short_rows = int(is_long.argmax()) if is_long.any() else rows or R
    pruned_rows = [int(row) for row in decodes.nonzero()[0] if row >= short_rows]
    batches = []
    if short_rows:
        longest = int(query_lens[:short_rows].max())
        batches.append(state.decode_batch(0, short_rows, longest))
    batches += [state.long_decode_batch(row, int(query_lens[row])) for row in pruned_rows]
    return Step(
        state,
        short_rows,
        pruned_rows,
        moves_slots=bool(decodes.any()),
        max_query_len=int(query_lens.max()),
        decodes=batches,
        prunes=_pack_prompts(state, ends.nonzero()[0], requests, query_start, query_lens),
        recorded=state.attention and state.attention.tiles(requests, query_start, max_seq_lens),
        knockouts=state.knockouts.of_step(requests, query_start, max_seq_lens),
    )


def _pack_prompts(
    state: SparseState,
    rows: np.ndarray,
    requests: np.ndarray,
    query_start: np.ndarray,
    query_lens: np.ndarray,
) -> list[Prompts]:
    """The prompts of these rows, in groups that fit into the workspace."""
    workspace, used = state.workspace, 0
    groups: list[list[tuple[int, int, int, int]]] = []
    for row in rows.tolist():
        n = int(state.prompt_tokens[requests[row]])
        if query_lens[row] < state.layout.window:
            raise RuntimeError(
                f"the chunk that ends a prompt of {n} tokens holds {query_lens[row]} queries, "
                f"fewer than the window of {state.layout.window}: the scheduler is not SPARSEMM's"
            )
        used += columns(n)
        if not groups or used > workspace.capacity or len(groups[-1]) == workspace.MAX_PROMPTS:
            groups.append([])
            used = columns(n)
        groups[-1].append((row, int(requests[row]), int(query_start[row + 1]), n))
    device = workspace.scores.device
    return [
        Prompts.pack(group, int(max(state.max_kept[request] for _, request, _, _ in group)), device)
        for group in groups
    ]


def capture_step(state: SparseState, rows: int, max_query_len: int) -> Step:
    """The step of a batch that is captured in a CUDA graph, or that only fills a rank's time."""
    return Step(
        state,
        rows,
        max_query_len=max_query_len,
        decodes=[state.decode_batch(0, rows, max_query_len)],
    )
