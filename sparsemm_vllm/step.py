"""What one step does to each request: decided on the host, once per step.

Knows nothing of vLLM; positions that only the device knows stay there.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.recording import KeptRecorder


@dataclass(frozen=True)
class PrunedCache:
    """The KV cache of a rank's pruned layers, seen as one tensor.

    Attributes:
        tensor: ``[L, B, Hkv, P, 2 * D]``.
        layers: index in the tensor of each attention layer, by name.
        layout: budgets of the whole model.
        own: the layers and heads of the layout that this rank owns.
    """

    tensor: torch.Tensor
    layers: dict[str, int]
    layout: CacheLayout
    own: tuple[slice, slice]

    @property
    def page_size(self) -> int:
        """Tokens of a block, `P`."""
        return self.tensor.shape[3]


class RequestTable:
    """Where each running request's head pages lie, by the worker's request index.

    Lengths and first pages are on the device, int32 ``[max_num_reqs, L, Hkv]`` for this rank's
    layers and heads; what shapes tensors is on the host.
    """

    def __init__(
        self, cache: PrunedCache, max_num_reqs: int, recorder: KeptRecorder | None = None
    ) -> None:
        L, _, Hkv, _, _ = cache.tensor.shape
        self.cache = cache
        self.recorder = recorder
        self.request_ids = [""] * max_num_reqs
        self.compact_blocks = np.zeros(max_num_reqs, dtype=np.int64)
        self.longest = np.zeros((max_num_reqs, L), dtype=np.int64)
        self.kept = np.zeros((max_num_reqs, L), dtype=np.int64)
        device = cache.tensor.device
        self.lengths = torch.zeros(max_num_reqs, L, Hkv, dtype=torch.int32, device=device)
        self.first_pages = torch.zeros_like(self.lengths)

    def add(self, index: int, prompt_tokens: int, request_id: str = "") -> None:
        """Enter a request; overwrites whatever had the index before."""
        layout, page_size = self.cache.layout, self.cache.page_size
        lengths = layout.kept_tokens(prompt_tokens)[self.cache.own]
        pages = -(-lengths // page_size)
        first_pages = pages.cumsum().reshape(pages.shape) - pages
        self.request_ids[index] = request_id
        self.compact_blocks[index] = layout.compact_blocks(prompt_tokens, page_size)
        self.longest[index] = lengths.max(1)
        self.kept[index] = lengths.sum(1)
        self.lengths[index].copy_(torch.from_numpy(lengths), non_blocking=True)
        self.first_pages[index].copy_(torch.from_numpy(first_pages), non_blocking=True)


@dataclass(frozen=True)
class Row:
    """A pruned request in this step's batch.

    Attributes:
        batch_index: its row in the block table and in sequence lengths.
        table_index: its index in the `RequestTable`.
        query: its tokens in this step's queries.
        prompt_tokens: `n`.
        prompt_blocks: `N`.
        compact_blocks: `C`.
        max_seq_len: bound of its tokens after this step.
    """

    batch_index: int
    table_index: int
    query: slice
    prompt_tokens: int
    prompt_blocks: int
    compact_blocks: int
    max_seq_len: int


@dataclass(frozen=True)
class Step:
    """A step's batch, sorted by what SPARSEMM does with each request.

    Attributes:
        table: the running requests.
        prunes: rows whose prompt this step completes.
        decodes: rows that attend to a pruned prompt.
        has_dense: whether any row attends to all of its tokens.
    """

    table: RequestTable
    prunes: list[Row] = field(default_factory=list)
    decodes: list[Row] = field(default_factory=list)
    has_dense: bool = True


def plan_step(
    table: RequestTable,
    table_indices: np.ndarray,
    prompt_tokens: np.ndarray,
    query_start: np.ndarray,
    max_seq_lens: np.ndarray,
) -> Step:
    """Sort a batch's requests.

    Args:
        table: the running requests.
        table_indices: index of each request in the table, ``[R]``.
        prompt_tokens: of each request, ``[R]``.
        query_start: first query of each request, and the end of the last, ``[R + 1]``.
        max_seq_lens: bound of each request's tokens after the step, ``[R]``; exact for rows that
            compute a prompt.

    Raises:
        RuntimeError: if a prompt's last chunk does not hold the window's queries.
    """
    page_size = table.cache.page_size
    prunes, decodes = [], []
    for i, index in enumerate(table_indices.tolist()):
        if not table.compact_blocks[index]:
            continue
        n, start, end = int(prompt_tokens[i]), int(query_start[i]), int(query_start[i + 1])
        seq_len = int(max_seq_lens[i])
        row = Row(
            batch_index=i,
            table_index=index,
            query=slice(start, end),
            prompt_tokens=n,
            prompt_blocks=-(-n // page_size),
            compact_blocks=int(table.compact_blocks[index]),
            max_seq_len=seq_len,
        )
        if seq_len == n:
            if end - start < table.cache.layout.window:
                raise RuntimeError(
                    f"the chunk that ends a prompt of {n} tokens holds {end - start} queries, "
                    f"fewer than the window of {table.cache.layout.window}: the scheduler is not "
                    "SPARSEMM's"
                )
            prunes.append(row)
        elif seq_len - (end - start) >= n:
            decodes.append(row)
    return Step(table, prunes, decodes, has_dense=len(decodes) < len(table_indices))


def correct_slots(
    step: Step, slots: torch.Tensor, positions: torch.Tensor, block_table: torch.Tensor
) -> None:
    """Move the cache slots of generated tokens behind the compact blocks, in place.

    vLLM maps the token at position `p` to entry ``p // P`` of its row; generated tokens of a pruned
    request lie `C` entries further.

    Args:
        step: this step.
        slots: slot of each token of the step, int64 ``[T]``.
        positions: of each token in its request, int64 ``[T]``.
        block_table: ``[R, max_blocks]``.
    """
    page_size = step.table.cache.page_size
    for row in step.decodes:
        position = positions[row.query]
        entry = position // page_size
        entry = torch.where(entry < row.prompt_blocks, entry, entry + row.compact_blocks)
        block = block_table[row.batch_index][entry].long()
        slots[row.query] = block * page_size + position % page_size
