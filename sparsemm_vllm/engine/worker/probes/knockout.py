"""The worker's part of causal scores: what an answer loses if one KV head keeps only its window.

A request names the head in its sampling parameters, ``extra_args={"sparsemm_knockout": [layer,
head, n]}``: of the first `n` tokens of its prompt, the queries behind them, those of an answer that
the prompt goes on with, see the window only, in that KV head of that pruned layer.
"""

from dataclasses import dataclass

import numpy as np
import torch

from sparsemm_vllm.names import KNOCKOUT


@dataclass(frozen=True)
class Knockout:
    """A request's queries of one step whose head is knocked out.

    Attributes:
        layer: index among this rank's pruned layers.
        head: KV head of this rank.
        row: row of the block table.
        query: first query in the step's.
        position: position of that query in its request.
        count: queries.
        first_key: position of the first key that they see.
    """

    layer: int
    head: int
    row: int
    query: int
    position: int
    count: int
    first_key: int


class Knockouts:
    """Heads that running requests are to do without.

    Args:
        own: pruned layers and KV heads of the whole model that this rank owns.
        window: observation window, `W`, in tokens.
    """

    def __init__(self, own: tuple[slice, slice], window: int) -> None:
        self._own = own
        self._window = window
        self._wanted: dict[int, tuple[int, int, int]] = {}

    def add(self, index: int, prompt_tokens: int, wanted: list[int] | None) -> None:
        """Enter a request; overwrites what had the index before.

        Raises:
            ValueError: for a prompt without an answer behind the `n` tokens.
        """
        self._wanted.pop(index, None)
        if wanted is None:
            return
        layer, head, n = wanted
        if not self._window <= n < prompt_tokens:
            raise ValueError(
                f"{KNOCKOUT} {wanted}: a window of {self._window} and an answer do not fit into "
                f"{prompt_tokens} tokens"
            )
        layers, heads = self._own
        if layers.start <= layer < layers.stop and heads.start <= head < heads.stop:
            self._wanted[index] = layer - layers.start, head - heads.start, n

    def of_step(
        self, requests: np.ndarray, query_start: np.ndarray, seq_lens: np.ndarray
    ) -> list[Knockout]:
        """Queries of a step that see less than they would.

        Args:
            requests: index of each request, ``[R]``.
            query_start: first query of each request, and the end of the last, ``[>= R + 1]``.
            seq_lens: tokens of each request after the step, ``[>= R]``.
        """
        found = []
        for row, request in enumerate(requests.tolist() if self._wanted else ()):
            if request not in self._wanted:
                continue
            layer, head, n = self._wanted[request]
            end_query, end = int(query_start[row + 1]), int(seq_lens[row])
            position = max(n, end - end_query + int(query_start[row]))
            if position < end:
                query = end_query - end + position
                first_key = n - self._window
                found.append(Knockout(layer, head, row, query, position, end - position, first_key))
        return found


def attend_without(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    block_table: torch.Tensor,
    knockout: Knockout,
    output: torch.Tensor,
    scale: float,
) -> None:
    """Attention of one KV head over the window and what follows it, in place of what stood there.

    Plain torch: it runs for a few queries of one head. Does not wait for the device.

    Args:
        query: the step's queries, ``[T, Hq, D]``.
        layer_cache: KV cache of one layer, not quantised, ``[B, Hkv, P, 2 * D]``.
        block_table: block table of the step, int32 ``[R, max_blocks]``.
        knockout: queries, head and keys.
        output: attention, ``[T, Hq, D]``; that of the queries and of the head's group is written.
        scale: factor of the attention logits.
    """
    _, Hkv, P, _ = layer_cache.shape
    G, D = query.shape[1] // Hkv, query.shape[2]
    end = knockout.position + knockout.count
    key = torch.arange(knockout.first_key, end, device=query.device)
    blocks = block_table[knockout.row, key // P].long()
    kv = layer_cache[blocks, knockout.head, key % P].float()

    queries = slice(knockout.query, knockout.query + knockout.count)
    heads = slice(knockout.head * G, (knockout.head + 1) * G)
    logits = torch.einsum("qgd,kd->qgk", query[queries, heads].float(), kv[:, :D]) * scale
    last = torch.arange(knockout.position, end, device=query.device)
    logits.masked_fill_((key > last[:, None])[:, None], -torch.inf)
    output[queries, heads] = (logits.softmax(-1) @ kv[:, D:]).to(output.dtype)
