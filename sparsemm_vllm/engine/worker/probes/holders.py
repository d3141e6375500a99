"""A running request, as `poison_freed` sees it: the blocks of its row, and what stands in them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Holder:
    """A running request and its row of the block table.

    Attributes:
        request_id: name of the request.
        prompt_tokens: tokens of its prompt, `n`.
        compact_blocks: compact blocks, `C`; 0 if its prompt stays whole.
        hit_tokens: tokens that were computed before it came.
        contents: digest of all tokens up to the end of each block, as far as they are known.
        given: blocks that it came with.
        blocks: entries of its row.
        generations: generation of each block when the request got it.
        entries: entry of each block.
        is_pruning: whether the step under way prunes its prompt.
        is_pruned: whether a step before did.
    """

    request_id: str
    prompt_tokens: int
    compact_blocks: int
    hit_tokens: int
    contents: list[bytes]
    given: list[int]
    blocks: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    entries: dict[int, int] = field(default_factory=dict)
    is_pruning: bool = False
    is_pruned: bool = False


def block_contents(
    token_ids: Sequence[int],
    pictures: Sequence[tuple[int, int, str]],
    adapter: str,
    page_size: int,
) -> list[bytes]:
    """What stands in each full block of a request's tokens, and before it.

    Args:
        token_ids: tokens that are known before the request runs.
        pictures: first token, tokens and name of each picture.
        adapter: name of its LoRA adapter, empty without one.
        page_size: tokens of a block.

    Returns:
        A digest of each block; equal for equal tokens and pictures up to the block's end.
    """
    digest, contents = adapter.encode(), []
    for end in range(page_size, len(token_ids) + 1, page_size):
        first = end - page_size
        shown = [p for p in pictures if p[0] < end and first < p[0] + p[1]]
        block = repr((digest, list(token_ids[first:end]), shown))
        digest = hashlib.blake2b(block.encode(), digest_size=16).digest()
        contents.append(digest)
    return contents
