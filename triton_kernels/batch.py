"""What the kernels are told of a step's requests, and the buffers that outlive the step.

Positions and lengths are int32 tensors on the device, so that nothing waits for it; what shapes a
launch is a Python integer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Rows of `Prompts.table`.
BATCH_ROW, REQUEST, QUERY_END, TOKENS, OFFSET = range(5)

# Columns of `DecodeBuffers.rows`.
TILE_ROW, FIRST_QUERY, QUERIES, POSITION, TAIL_START, PROMPT_BLOCKS, COMPACT_BLOCKS, TAIL = range(8)

# Column of `QueryTiles.table` behind the first four of these.
TARGET = 4

# Beginning and ending an item costs a decode program about as much as reading this many KV tiles:
# see benchmarks/decode_model.py, which says from which figures.
SETUP_TILES = 1

OFFSET_ALIGNMENT = 16  # tokens: 16-byte loads of scores begin at multiples of it


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host's; the host goes on at once.

    A copy is asynchronous only from pinned memory. This one gets memory of its own, which PyTorch
    gives to nobody else before the copy has ended: nothing that a copy still reads is overwritten,
    however many steps are under way.

    Args:
        values: tensor on the host, of any shape and type.
        device: where the kernels run.
    """
    if device.type != "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class HeadPages:
    """Where the head pages of each running request lie; a request has a fixed index.

    Attributes:
        prompt_tokens: `n` of each request, int32 ``[max_requests]``.
        compact_blocks: `C`, 0 for prompts that are not pruned, int32 ``[max_requests]``.
        lengths: tokens in each head's pages, int32 ``[max_requests, L, Hkv]``.
        first_pages: each head's first head page, int32 ``[max_requests, L, Hkv]``.
        page_units: where each head page begins in the cache, in units of a token's ``2 * D``
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
            max_requests: requests that run at once.
            L: layers.
            Hkv: KV heads.
            device: where the kernels run.
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
            prompt_tokens: tokens of its prompt, `n`.
            compact_blocks: its compact blocks, `C`.
            lengths: tokens in each head's pages, ``[L, Hkv]``, on the host.
            first_pages: first head page of each head, ``[L, Hkv]``, on the host.
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
        table: int32 ``[5, R]``: of each prompt its row in the block table, its index in
            `HeadPages`, the end of its queries in the step's, `n`, and its first column in the
            workspace.
        max_tokens: the longest `n`.
        max_kept: most tokens that a head keeps in its pages.
        entries: the columns of the table, a prompt each, on the host.
    """

    table: torch.Tensor
    max_tokens: int
    max_kept: int
    entries: list[tuple[int, ...]]

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
            rows: ``(batch row, request, end of its queries, n)`` of each prompt.
            max_kept: most tokens that a head keeps in its pages.
            device: where the kernels run.
        """
        placed, end = [], 0
        for *place, n in rows:
            placed.append((*place, n, end))
            end += columns(n)
        table = torch.tensor(placed, dtype=torch.int32).T.contiguous()
        longest = max(row[3] for row in rows)
        return cls(to_device(table, device), longest, max_kept, placed)


def columns(prompt_tokens: int) -> int:
    """Workspace columns of a prompt."""
    return -(-prompt_tokens // OFFSET_ALIGNMENT) * OFFSET_ALIGNMENT


@dataclass(frozen=True)
class PruneWorkspace:
    """Scratch memory of a prune, allocated once.

    Attributes:
        sums: attention that each token gets, not pooled, float32 ``[Hkv, capacity]``.
        scores: pooled scores, float32 ``[Hkv, capacity]``.
        positions: kept positions, from each prompt's first column on, int32 ``[Hkv, capacity]``.
        stats: logarithm of each window query's softmax sum over a part of the prompt, float32.
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


def query_block(rows: int) -> int:
    """Rows of a tile of queries: a power of two, 16 at least (tensor cores), 64 at most."""
    return min(64, max(16, 1 << (rows - 1).bit_length()))


def decode_tokens(D: int, dtype: torch.dtype) -> int:
    """Tokens of a KV tile: as many as the registers of a program take in.

    Args:
        D: head size.
        dtype: type of the cache.
    """
    D = 1 << (D - 1).bit_length()
    if dtype == torch.float32:  # multiplied without tensor cores
        return max(16, 2048 // D)
    return 16 if D > 128 and dtype == torch.float8_e4m3fn else min(128, 8192 // D)


@dataclass(frozen=True)
class DecodeOptions:
    """How the decode kernel is compiled.

    Attributes:
        block_n: tokens of a KV tile.
        stages: pipeline stages of the loop over KV tiles.
        num_warps: warps of a program.
        maxnreg: registers of a thread at most.
        pdl: programmatic dependent launch: programs begin while the kernel before still ends, and
            wait for it where they read what it wrote. Compute capability 9.0 and up.
        lists_pages: where head pages begin is computed once, when a prompt is pruned, and read in
            every step (`HeadPages.page_units`).
    """

    block_n: int
    stages: int
    num_warps: int
    maxnreg: int = 255
    pdl: bool = False
    lists_pages: bool = False


def decode_options(
    D: int, cache_dtype: torch.dtype, query_dtype: torch.dtype, block_m: int
) -> DecodeOptions:
    """The options that serving uses; `tune` of the GPU suite tries others.

    Chosen by the cycles that `benchmarks/sass.py` reads from the machine code; on one H200 none of
    nine other options was more than 2 % faster than these (`tune`, 2026-11-28). There `pdl` gained
    0.6 and 1.7 %, `lists_pages` lost 1 %: both stay off.

    A tile of 16 query rows leaves registers for twice the tokens of `decode_tokens`: what a tile
    costs whatever its size (barriers, softmax statistics) is paid half as often. Two stages: keys
    of the next tile are on their way while the values of this one are multiplied, and the other way
    round; two programs of a multiprocessor have 64 KiB on the way (16 bits, `D` 128), and 4.3 TB/s
    need 33 KiB. A third stage, for the block numbers, makes the beginning of an item longer than it
    makes a tile shorter. Where a tile is smaller it is worth it.

    Args:
        D: head size.
        cache_dtype: type of the cache.
        query_dtype: type of the queries.
        block_m: rows of a query tile, see `query_block`.
    """
    tokens = decode_tokens(D, cache_dtype)
    if query_dtype == torch.float32:
        return DecodeOptions(tokens, stages=2, num_warps=8)
    if block_m > 16:
        return DecodeOptions(min(64, tokens), stages=3, num_warps=8)
    if D > 128 or cache_dtype == torch.float8_e4m3fn:  # converted, fp8 values need registers too
        return DecodeOptions(tokens, stages=3, num_warps=4)
    return DecodeOptions(min(128, 2 * tokens), stages=2, num_warps=4)


def decode_rows(D: int, dtype: torch.dtype) -> int:
    """Rows of a query tile at most: queries times query heads of a KV head.

    Args:
        D: head size.
        dtype: of the cache.
    """
    return 64 // (1 + (D > 128)) // (1 + (dtype == torch.float32))


def decode_queries(max_query_len: int, G: int, max_rows: int = 64) -> int:
    """Queries of a decode tile: those of a row, as far as `max_rows` rows hold them for `G` heads.

    Raises:
        ValueError: if they do not hold a single one.
    """
    if max_rows < G:
        raise ValueError(f"{G} query heads share a KV head; a tile has {max_rows} rows")
    return min(query_block(max_query_len * G), max_rows) // G


def padded_queries(G: int, window: int) -> int:
    """Window queries of a KV head, all of its query heads', in whole tiles."""
    block = query_block(G * window)
    return -(-G * window // block) * block


def _empty_schedule(
    max_query_tiles: int, L: int, Hkv: int, max_programs: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The tensors of `DecodeBuffers` that are a schedule's own; nothing is to be read."""
    items = max_query_tiles * Hkv
    shapes = {
        "rows": (max_query_tiles, 8),
        "items": (L, items, 2),
        "first_tile": (L, items + 1),
        "first_item": (L, max_programs),
        "arrived": (items,),
    }
    return {
        name: torch.zeros(shape, dtype=torch.int32, device=device) for name, shape in shapes.items()
    }


@dataclass(frozen=True)
class DecodeBuffers:
    """How decode attention is spread over the device, rewritten every step.

    A *query tile* is up to `block_q` queries of one request; an *item* is a query tile and a KV
    head, ``item = query_tile * Hkv + head``; its tokens are read in *KV tiles*. The work of an item
    is its KV tiles and `SETUP_TILES` more, for what it costs to begin and to end it. Equal shares
    of a layer's work go to the programs of a launch, whatever items they belong to.

    Attributes:
        rows: int32 ``[max_query_tiles, 8]``: of each query tile its row in the block table, its
            first query in the step's, how many, the position of the first, the first position of
            the tail, `N`, `C`, and the tokens of the tail that it sees.
        items: tokens in the head pages of each item, and its first head page, int32
            ``[L, max_items, 2]``; with `HeadPages.page_units` the latter's place in all of them.
        first_tile: work of the items before each, and of all, int32 ``[L, max_items + 1]``.
        first_item: item at which each program begins, int32 ``[L, max_programs]``.
        arrived: programs that have finished their part of an item, int32 ``[max_items]``; zero
            between two launches.
        partial: unfinished outputs, of a program's first and last item, float32
            ``[max_programs, 2, max_rows, D]``.
        stats: maximum and sum of their softmax, float32 ``[max_programs, 2, max_rows, 2]``.
        cache_dtype: type of the cache.
        query_dtype: type of the queries.
    """

    rows: torch.Tensor
    items: torch.Tensor
    first_tile: torch.Tensor
    first_item: torch.Tensor
    arrived: torch.Tensor
    partial: torch.Tensor
    stats: torch.Tensor
    cache_dtype: torch.dtype
    query_dtype: torch.dtype

    @classmethod
    def allocate(
        cls,
        max_query_tiles: int,
        L: int,
        Hkv: int,
        D: int,
        cache_dtype: torch.dtype,
        max_programs: int,
        device: torch.device,
        query_dtype: torch.dtype | None = None,
    ) -> "DecodeBuffers":
        """Buffers of a schedule in which nothing is to be read.

        Args:
            max_query_tiles: query tiles of a batch.
            L: layers.
            Hkv: KV heads.
            D: head size.
            cache_dtype: type of the cache.
            max_programs: programs of a launch at most.
            device: where the kernels run.
            query_dtype: type of the queries; the cache's if not given, bfloat16 beside fp8.
        """
        if query_dtype is None:
            query_dtype = torch.bfloat16 if cache_dtype == torch.float8_e4m3fn else cache_dtype
        max_rows = decode_rows(D, cache_dtype)
        return cls(
            **_empty_schedule(max_query_tiles, L, Hkv, max_programs, device),
            partial=torch.empty(max_programs, 2, max_rows, D, device=device),
            stats=torch.empty(max_programs, 2, max_rows, 2, device=device),
            cache_dtype=cache_dtype,
            query_dtype=query_dtype,
        )

    def for_tiles(self, max_query_tiles: int, Hkv: int) -> "DecodeBuffers":
        """Buffers of another schedule, which shares the scratch memory with this one."""
        L, device = self.items.shape[0], self.rows.device
        return DecodeBuffers(
            **_empty_schedule(max_query_tiles, L, Hkv, self.max_programs, device),
            partial=self.partial,
            stats=self.stats,
            cache_dtype=self.cache_dtype,
            query_dtype=self.query_dtype,
        )

    @property
    def max_rows(self) -> int:
        """Rows of a query tile at most."""
        return self.partial.shape[2]

    @property
    def max_programs(self) -> int:
        """Programs of a decode launch at most."""
        return self.first_item.shape[1]


@dataclass(frozen=True)
class DecodeBatch:
    """Rows of a step that `sparse_decode` computes.

    Attributes:
        buffers: their schedule.
        first_row: the first of them in the batch.
        rows: how many.
        tiles_per_row: query tiles of a row.
        block_q: queries of a tile.
        block_m: rows of a query tile: its queries times the query heads of a KV head, padded.
        programs: programs of a launch.
        options: how the kernel is compiled.
        page_units: see `HeadPages`.
    """

    buffers: DecodeBuffers
    first_row: int
    rows: int
    tiles_per_row: int
    block_q: int
    block_m: int
    programs: int
    options: DecodeOptions
    page_units: torch.Tensor | None = None

    @property
    def query_tiles(self) -> int:
        """Query tiles in all."""
        return self.rows * self.tiles_per_row

    @classmethod
    def of(
        cls,
        buffers: DecodeBuffers,
        first_row: int,
        rows: int,
        max_query_len: int,
        G: int,
        programs: int | None = None,
        options: DecodeOptions | None = None,
        page_units: torch.Tensor | None = None,
    ) -> "DecodeBatch":
        """Rows of up to `max_query_len` queries each.

        Args:
            buffers: where the schedule is written.
            first_row: the first of the rows in the step's batch.
            rows: how many.
            max_query_len: queries of a row at most.
            G: query heads of a KV head.
            programs: programs of a launch; as many as the buffers hold if not given.
            options: how the kernel is compiled; `decode_options` if not given.
            page_units: see `HeadPages`.

        Raises:
            ValueError: if the buffers are too small, or `G` is too large.
        """
        block_q = decode_queries(max_query_len, G, buffers.max_rows)
        block_q = max(1, min(block_q, max_query_len))
        block_m = query_block(block_q * G)
        if options is None:
            D = buffers.partial.shape[3]
            options = decode_options(D, buffers.cache_dtype, buffers.query_dtype, block_m)
        programs = programs or buffers.max_programs
        tiles = -(-max_query_len // block_q)
        batch = cls(
            buffers, first_row, rows, tiles, block_q, block_m, programs, options, page_units
        )
        if batch.query_tiles > buffers.rows.shape[0]:
            raise ValueError(
                f"{batch.query_tiles} query tiles, but the buffers hold {buffers.rows.shape[0]}"
            )
        if programs > buffers.max_programs:
            raise ValueError(f"{programs} programs, but the buffers hold {buffers.max_programs}")
        return batch


@dataclass(frozen=True)
class QueryTiles:
    """Queries of a step whose attention is recorded, up to `block_q` of one request in a tile.

    Attributes:
        table: int32 ``[tiles, 5]``: of each tile its row in the block table, its first query in the
            step's, how many, the position of the first, and the row that records it; the others
            follow.
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
            spans: the five numbers of a tile, for any number of queries.
            block_q: queries of a tile.
            device: where the kernels run.
        """
        rows = [
            (row, first + i, min(block_q, queries - i), position + i, target + i)
            for row, first, queries, position, target in spans
            for i in range(0, queries, block_q)
        ]
        table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 5)
        return cls(to_device(table, device), block_q)
