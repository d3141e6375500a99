"""The decode rows of a step, and how their attention is spread over the device."""

from dataclasses import dataclass

import torch

from .tables import ITEM_COLUMNS, TILE_COLUMNS
from .tile_sizes import DecodeOptions, decode_options, decode_queries, decode_rows, query_block

# Beginning and ending an item costs a decode program about as much as reading this many KV tiles:
# see benchmarks/decode_model.py, which says from which figures.
SETUP_TILES = 1


def _empty_schedule(
    max_query_tiles: int, L: int, Hkv: int, max_programs: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The tensors of `DecodeBuffers` that are a schedule's own; nothing is to be read."""
    items = max_query_tiles * Hkv
    shapes = {
        "tiles": (max_query_tiles, TILE_COLUMNS),
        "items": (L, items, ITEM_COLUMNS),
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
        tiles: query tiles, int32 ``[max_query_tiles, TILE_COLUMNS]``; `tables` names the columns.
        items: items of each layer, int32 ``[L, max_items, ITEM_COLUMNS]``; `tables` names the
            columns.
        first_tile: work of the items before each, and of all, int32 ``[L, max_items + 1]``.
        first_item: item at which each program begins, int32 ``[L, max_programs]``.
        arrived: number of programs that have finished their part of an item, int32
            ``[max_items]``; zero between two launches.
        partial: unfinished outputs, of a program's first and last item, float32
            ``[max_programs, 2, max_rows, D]``.
        stats: maximum and sum of their softmax, float32 ``[max_programs, 2, max_rows, 2]``.
        cache_dtype: type of the cache.
        query_dtype: type of the queries.
    """

    tiles: torch.Tensor
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
            max_query_tiles: query tiles of a batch, at most.
            L: layers.
            Hkv: KV heads.
            D: head size, in elements.
            cache_dtype: type of the cache.
            max_programs: programs of a launch at most.
            device: device where the kernels run.
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
        L, device = self.items.shape[0], self.tiles.device
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
        buffers: buffers with their schedule.
        first_row: first of the rows in the step's batch.
        rows: number of rows.
        tiles_per_row: query tiles of a row.
        block_q: queries of a tile.
        block_m: rows of a query tile: its queries times the query heads of a KV head, padded.
        programs: programs of a launch.
        options: options by which the kernel is compiled.
        page_units: places of the head pages, see `HeadPages`.
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
            buffers: buffers where the schedule is written.
            first_row: first of the rows in the step's batch.
            rows: number of rows.
            max_query_len: queries of a row at most.
            G: query heads of a KV head.
            programs: programs of a launch; as many as the buffers hold if not given.
            options: options by which the kernel is compiled; `decode_options` if not given.
            page_units: places of the head pages, see `HeadPages`.

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
        if batch.query_tiles > buffers.tiles.shape[0]:
            raise ValueError(
                f"{batch.query_tiles} query tiles, but the buffers hold {buffers.tiles.shape[0]}"
            )
        if programs > buffers.max_programs:
            raise ValueError(f"{programs} programs, but the buffers hold {buffers.max_programs}")
        return batch
