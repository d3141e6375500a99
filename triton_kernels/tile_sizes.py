"""How large tiles of queries and of tokens are, and how the decode kernel is compiled."""

from dataclasses import dataclass

import torch


def query_block(rows: int) -> int:
    """Rows of a tile of queries: a power of two, 16 at least (tensor cores), 64 at most."""
    return min(64, max(16, 1 << (rows - 1).bit_length()))


def padded_queries(G: int, window: int) -> int:
    """Window queries of a KV head, all of its query heads', in whole tiles."""
    block = query_block(G * window)
    return -(-G * window // block) * block


def decode_tokens(D: int, dtype: torch.dtype) -> int:
    """Tokens of a KV tile: as many as the registers of a program take in.

    Args:
        D: head size, in elements.
        dtype: type of the cache.
    """
    D = 1 << (D - 1).bit_length()
    if dtype == torch.float32:  # multiplied without tensor cores
        return max(16, 2048 // D)
    return 16 if D > 128 and dtype == torch.float8_e4m3fn else min(128, 8192 // D)


def decode_rows(D: int, dtype: torch.dtype) -> int:
    """Rows of a query tile at most: queries times query heads of a KV head.

    Args:
        D: head size, in elements.
        dtype: type of the cache.
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
        lists_pages: flag: the places of head pages are computed once, when a prompt is pruned, and
            read in every step (`HeadPages.page_units`).
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
        D: head size, in elements.
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
