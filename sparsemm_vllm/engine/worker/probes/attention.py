"""The worker's part of a head profile: which key each recorded query attends to most.

A request names its recorded queries in its sampling parameters: ``extra_args={"sparsemm_record":
[row, count]}`` records the last `count` queries of its prompt and all that follow, into the rows of
a buffer from `row` on. Whoever asks divides the rows among requests, and reads them.
"""

import numpy as np
import torch

from sparsemm_vllm.names import RECORD
from sparsemm_vllm.triton_kernels.batch import QueryTiles
from sparsemm_vllm.triton_kernels.tile_sizes import decode_queries

NEVER = 2**62  # a position that no request reaches


class AttentionRecorder:
    """Top-1 keys of the queries that requests want recorded.

    Args:
        L: pruned layers of this rank.
        Hq: query heads of this rank.
        G: query heads of a KV head.
        max_rows: rows of a query tile, at most; see `decode_rows`.
        rows: queries that the buffer holds.
        max_requests: requests that run at once, at most.
        device: device of the kernels.

    Attributes:
        keys: positions, int32 ``[L, rows, Hq]``; -1 in rows that nothing was recorded in.
    """

    def __init__(
        self,
        L: int,
        Hq: int,
        G: int,
        max_rows: int,
        rows: int,
        max_requests: int,
        device: torch.device,
    ) -> None:
        self.keys = torch.full((L, rows, Hq), -1, dtype=torch.int32, device=device)
        self._G = G
        self._max_rows = max_rows
        self._first = np.full(max_requests, NEVER)  # recorded position of each request
        self._row = np.zeros(max_requests, dtype=np.int64)

    def add(
        self, index: int, prompt_tokens: int, wanted: list[int] | None, dense: bool = True
    ) -> None:
        """Enter a request; overwrites what had the index before.

        A request that resumes after preemption records the same again.

        Args:
            index: index of the request.
            prompt_tokens: length of its prompt, `n`, in tokens.
            wanted: first row and number of queries, ``[2]``, as the request asks; or nothing.
            dense: whether all its queries see all keys where they were computed; those of tokens
                that are generated from a pruned prompt do not.

        Raises:
            ValueError: for rows or queries that do not exist, or cannot be recorded.
        """
        self._first[index] = NEVER
        if wanted is None:
            return
        if not dense:
            raise ValueError(
                f"{RECORD}: attention to a pruned prompt cannot be recorded; generate one token"
            )
        row, count = wanted
        if not 1 <= count <= prompt_tokens or not 0 <= row <= self.keys.shape[1] - count:
            raise ValueError(
                f"{RECORD} {wanted}: the last {count} queries of {prompt_tokens}, from row {row} "
                f"of {self.keys.shape[1]} on"
            )
        self._first[index] = prompt_tokens - count
        self._row[index] = row

    def tiles(
        self, requests: np.ndarray, query_start: np.ndarray, seq_lens: np.ndarray
    ) -> QueryTiles | None:
        """Queries of a step to record; none if there are none.

        Args:
            requests: index of each request, ``[R]``.
            query_start: first query of each request, and the end of the last, ``[>= R + 1]``.
            seq_lens: tokens of each request after the step, ``[>= R]``.
        """
        spans = []
        for i, request in enumerate(requests.tolist()):
            first_query, end_query = int(query_start[i]), int(query_start[i + 1])
            end = int(seq_lens[i])
            first = max(end - end_query + first_query, int(self._first[request]))
            row = int(self._row[request] + first - self._first[request])
            count = min(end - first, self.keys.shape[1] - row)
            if count > 0:
                spans.append((i, end_query - end + first, count, first, row))
        if not spans:
            return None
        longest = max(span[2] for span in spans)
        block_q = decode_queries(longest, self._G, self._max_rows)
        return QueryTiles.pack(spans, block_q, self.keys.device)

    def read(self, rows: int) -> bytes:
        """The first rows of the buffer, ``[L, rows, Hq]`` in bytes, which are then forgotten.

        Waits for the device.
        """
        read = self.keys[:, :rows].cpu().numpy().tobytes()
        self.keys[:, :rows] = -1
        return read
