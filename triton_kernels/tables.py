"""The columns of the kernels' tables, by name, for the host and for the kernels.

A kernel has a ``tl.constexpr`` argument for each column that it reads or writes; its default is the
number that stands here.
"""

from typing import NamedTuple


class Prompt(NamedTuple):
    """A prompt that this step completes: a column of `Prompts.table`.

    Attributes:
        batch_row: row of its request in the batch.
        request: index of its request in `HeadPages`.
        query_end: end of its queries in the step's.
        tokens: tokens of the prompt, `n`.
        offset: first column of the prompt in the `PruneWorkspace`.
    """

    batch_row: int
    request: int
    query_end: int
    tokens: int
    offset: int


# Rows of `Prompts.table`, whose columns are prompts.
PROMPT_ROWS = len(Prompt._fields)
BATCH_ROW, REQUEST, QUERY_END, TOKENS, OFFSET = range(PROMPT_ROWS)

# Columns of `DecodeBuffers.tiles`: the query tile's row of the batch, its first query in the
# step's, its number of queries, the position of the first one, the position of the tail's first
# token, `N`, `C`, and the tokens of the tail that the tile sees.
TILE_COLUMNS = 8
TILE_ROW, FIRST_QUERY, QUERIES, POSITION, TAIL_START, PROMPT_BLOCKS, COMPACT_BLOCKS, TAIL = range(
    TILE_COLUMNS
)

# Columns of `DecodeBuffers.items`: tokens in the item's head pages, and its first head page; with
# `HeadPages.page_units` the latter's place in all of them.
ITEM_COLUMNS = 2
KEPT, FIRST_PAGE = range(ITEM_COLUMNS)

# Columns of `QueryTiles.table`: the first four of `DecodeBuffers.tiles`, and the row of the output
# that records the first query; the tile's other queries follow.
TARGET_COLUMNS = 5
TARGET = 4
