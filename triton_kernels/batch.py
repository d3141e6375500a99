"""What the kernels are told of a step's requests, and the buffers that outlive the step.

Positions and lengths are int32 tensors on the device, so that nothing waits for it; what shapes a
launch is a Python integer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tables import PROMPT_ROWS, TARGET_COLUMNS, Prompt
from .tile_sizes import padded_queries

OFFSET_ALIGNMENT = 16  # tokens: 16-byte loads of scores begin at multiples of it


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host's; the host goes on at once.

    A copy is asynchronous only from pinned memory. This one gets memory of its own, which PyTorch
    gives to nobody else before the copy has ended: nothing that a copy still reads is overwritten,
    however many steps are under way.

    Args:
        values: tensor on the host, of any shape and type.
        device: device where the kernels run.
    """
    if device.type != "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class Rows:
    """The rows of a step's batch, on the device.

    The first rows are requests. A batch that is padded for a CUDA graph has more rows behind them,
    which have no queries and belong to no request.

    Attributes:
        block_table: block numbers of each row, int32 ``[R', max_blocks]``, rows contiguous.
        query_start: first query of each row in the step's, and the end of the last, int32
            ``[>= R' + 1]``.
        seq_lens: tokens of each row after the step, int32 ``[>= R']``.
        requests: index in `HeadPages` of each request, int32 or int64 ``[R]``, ``R <= R'``.
    """

    block_table: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    requests: torch.Tensor


@dataclass(frozen=True)
class HeadPages:
    """Where the head pages of each running request lie; a request has a fixed index.

    Attributes:
        prompt_tokens: tokens of each request's prompt, `n`, int32 ``[max_requests]``.
        compact_blocks: compact blocks of each request, `C`, 0 where the prompt is not pruned,
            int32 ``[max_requests]``.
        lengths: tokens in each head's pages, int32 ``[max_requests, L, Hkv]``.
        first_pages: first head page of each head, int32 ``[max_requests, L, Hkv]``.
        page_units: place in the cache where each head page begins, in units of a token's ``2 * D``
            elements, int32 ``[max_requests, max_pages]``; written by `list_pages`. None: the decode
            kernel computes it.
    """

    prompt_tokens: torch.Tensor
    compact_blocks: torch.Tensor
    lengths: torch.Tensor
    first_pages: torch.Tensor
    page_units: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, max_requests: int, L: int, Hkv: int, device: torch.device, max_pages: int = 0
    ) -> "HeadPages":
        """No request is pruned.

        Args:
            max_requests: requests that run at once, at most.
            L: layers.
            Hkv: KV heads.
            device: device where the kernels run.
            max_pages: head pages of a request at most, for `page_units`; 0 does without.

        Raises:
            ValueError: if 32 bits do not hold the places of all requests' head pages.
        """
        if max_requests * max_pages >= 2**31:
            raise ValueError(f"{max_requests} requests of {max_pages} head pages: too many to list")
        shapes = [(max_requests,), (max_requests,), (max_requests, L, Hkv), (max_requests, L, Hkv)]
        if max_pages:
            shapes.append((max_requests, max_pages))
        return cls(*(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))

    def enter(
        self,
        request: int,
        prompt_tokens: int,
        compact_blocks: int,
        lengths: torch.Tensor,
        first_pages: torch.Tensor,
    ) -> None:
        """Overwrite what stands at a request's index. Does not wait for the device.

        One copy from the host, then copies on the device, which come after the kernels that were
        launched before: a step that is under way still reads the old entries.

        Args:
            request: index of the request.
            prompt_tokens: tokens of the request's prompt, `n`.
            compact_blocks: compact blocks of the request, `C`.
            lengths: tokens in each head's pages, int ``[L, Hkv]``, on the host.
            first_pages: first head page of each head, int ``[L, Hkv]``, on the host.
        """
        numbers = torch.tensor([prompt_tokens, compact_blocks], dtype=torch.int32)
        row = torch.cat([numbers, lengths.flatten().int(), first_pages.flatten().int()])
        heads = lengths.numel()
        targets = (self.prompt_tokens, self.compact_blocks, self.lengths, self.first_pages)
        parts = to_device(row, self.lengths.device).split([1, 1, heads, heads])
        for target, part in zip(targets, parts, strict=True):
            target[request].copy_(part.view(target.shape[1:]))


@dataclass(frozen=True)
class Prompts:
    """Prompts that this step completes and prunes, side by side in a `PruneWorkspace`.

    Attributes:
        table: numbers of each prompt, int32 ``[PROMPT_ROWS, R]``; `tables` names the rows.
        max_tokens: tokens of the longest prompt.
        max_kept: tokens that a head keeps in its pages, at most.
        entries: columns of the table, a prompt each, on the host.
    """

    table: torch.Tensor
    max_tokens: int
    max_kept: int
    entries: list[Prompt]

    @property
    def count(self) -> int:
        """Prompts, `R`."""
        return self.table.shape[1]

    @classmethod
    def pack(
        cls, rows: Sequence[tuple[int, int, int, int]], max_kept: int, device: torch.device
    ) -> "Prompts":
        """Give every prompt its columns.

        Args:
            rows: numbers of each prompt, ``(batch row, request, end of its queries, n)``.
            max_kept: tokens that a head keeps in its pages, at most.
            device: device where the kernels run.
        """
        placed, end = [], 0
        for batch_row, request, query_end, n in rows:
            placed.append(Prompt(batch_row, request, query_end, n, end))
            end += columns(n)
        table = torch.tensor(placed, dtype=torch.int32).T.contiguous()
        longest = max(prompt.tokens for prompt in placed)
        return cls(to_device(table, device), longest, max_kept, placed)

    def check(self) -> None:
        """Refuse a table of another shape, layout or type.

        Raises:
            ValueError: naming what is wanted.
        """
        table = self.table
        right = table.dim() == 2 and len(table) == PROMPT_ROWS and table.dtype == torch.int32
        if not right or not table.is_contiguous():
            raise ValueError(
                f"prompts.table {list(table.shape)} must be int32 [{PROMPT_ROWS}, R], contiguous"
            )


def columns(prompt_tokens: int) -> int:
    """Workspace columns of a prompt."""
    return -(-prompt_tokens // OFFSET_ALIGNMENT) * OFFSET_ALIGNMENT


@dataclass(frozen=True)
class PruneWorkspace:
    """Scratch memory of a prune, allocated once.

    Attributes:
        sums: attention that each token gets, before pooling, float32 ``[Hkv, capacity]``.
        scores: pooled scores, float32 ``[Hkv, capacity]``.
        positions: positions of kept tokens, from each prompt's first column on, int32
            ``[Hkv, capacity]``.
        stats: logarithms of each window query's softmax sum over a part of the prompt, float32, one
            dimension.
    """

    sums: torch.Tensor
    scores: torch.Tensor
    positions: torch.Tensor
    stats: torch.Tensor

    # Programs that share a launch of the softmax statistics, and prompts at most.
    PARTS = 512
    MAX_PROMPTS = 32

    @classmethod
    def allocate(
        cls, capacity: int, Hq: int, Hkv: int, window: int, device: torch.device
    ) -> "PruneWorkspace":
        """Memory for prompts of `capacity` tokens in all."""
        capacity = columns(capacity)
        # A part has at most 64 rows of queries, see window_scores.
        stats = max(cls.PARTS * 64, cls.MAX_PROMPTS * Hkv * padded_queries(Hq // Hkv, window))
        return cls(
            torch.empty(Hkv, capacity, device=device),
            torch.empty(Hkv, capacity, device=device),
            torch.empty(Hkv, capacity, dtype=torch.int32, device=device),
            torch.empty(stats, device=device),
        )

    @property
    def capacity(self) -> int:
        """Columns: tokens of all prompts of one launch."""
        return self.scores.shape[1]

    def check(self, prompts: Prompts, Hkv: int) -> None:
        """Refuse prompts that do not fit, and scores of another shape, layout or type.

        Args:
            prompts: prompts of one launch.
            Hkv: KV heads of the cache.

        Raises:
            ValueError: naming what is wanted.
        """
        if prompts.count > self.MAX_PROMPTS:
            raise ValueError(f"{prompts.count} prompts; at most {self.MAX_PROMPTS} at once")
        for name, buffer in (("sums", self.sums), ("scores", self.scores)):
            right = len(buffer) == Hkv and buffer.dtype == torch.float32
            if not right or not buffer.is_contiguous():
                raise ValueError(
                    f"workspace.{name} {list(buffer.shape)} must be float32 [Hkv, capacity] with "
                    f"Hkv {Hkv}, contiguous"
                )
        if columns(prompts.max_tokens) > self.capacity:
            raise ValueError(
                f"a prompt of {prompts.max_tokens} tokens does not fit into {self.capacity} "
                "workspace columns"
            )


@dataclass(frozen=True)
class QueryTiles:
    """Queries of a step whose attention is recorded, up to `block_q` of one request in a tile.

    Attributes:
        table: numbers of each tile, int32 ``[tiles, TARGET_COLUMNS]``; `tables` names the columns.
        block_q: queries of a tile.
    """

    table: torch.Tensor
    block_q: int

    @property
    def count(self) -> int:
        """Tiles in all."""
        return self.table.shape[0]

    @classmethod
    def pack(
        cls, spans: Sequence[tuple[int, int, int, int, int]], block_q: int, device: torch.device
    ) -> "QueryTiles":
        """Cut spans of queries into tiles.

        Args:
            spans: numbers of a tile in the order of the columns, for any number of queries.
            block_q: queries of a tile.
            device: device where the kernels run.
        """
        rows = [
            (row, first + i, min(block_q, queries - i), position + i, target + i)
            for row, first, queries, position, target in spans
            for i in range(0, queries, block_q)
        ]
        table = torch.tensor(rows, dtype=torch.int32).reshape(-1, TARGET_COLUMNS)
        return cls(to_device(table, device), block_q)
