"""What one step does to each request: decided on the host, once per step.

Knows nothing of vLLM; positions that only the device knows stay there.
"""

from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import torch

from sparsemm_vllm.attention_record import AttentionRecorder
from sparsemm_vllm.knockout import Knockout, Knockouts
from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.poison import Poison
from sparsemm_vllm.prompt_scores import score_at_random, split_layer
from sparsemm_vllm.prune_timer import PruneTimer
from sparsemm_vllm.recording import KeptRecorder
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import (
    DecodeBatch,
    DecodeBuffers,
    HeadPages,
    Prompts,
    PruneWorkspace,
    QueryTiles,
    columns,
    decode_queries,
    decode_rows,
)

# Queries of a row that the decode kernel is made for.
DECODE_QUERIES = 16


@dataclass(frozen=True)
class Heads:
    """Attention heads of a rank's pruned layers.

    Attributes:
        L: pruned layers.
        Hq: query heads.
        Hkv: KV heads.
        D: head size.
    """

    L: int
    Hq: int
    Hkv: int
    D: int

    @property
    def G(self) -> int:  # noqa: N802
        """Query heads of a KV head."""
        return self.Hq // self.Hkv


@dataclass(frozen=True)
class PrunedCache:
    """The KV cache of a rank's pruned layers, seen as one tensor.

    Attributes:
        tensor: ``[L, B, Hkv, P, 2 * D]``.
        layers: index in the tensor of each attention layer, by name.
    """

    tensor: torch.Tensor
    layers: dict[str, int]


def choose_ops(device: torch.device) -> ModuleType:
    """The kernels, or their torch twins where there is no GPU."""
    return triton_ops if device.type == "cuda" else torch_ops


class SparseState:
    """What a rank keeps between steps: the running requests and the kernels' memory.

    Device memory is allocated here, once, before vLLM measures what is left for the KV cache. A
    request keeps its index, by which the kernels find its head pages.

    The memory comes from vLLM's pool of weights: sleep of level 2 discards what it holds, and
    nothing restores it. So nothing here may have to be right before a request writes it: a request
    that is added writes its head pages, a step its schedule, a prune its workspace.

    Args:
        layout: budgets of the whole model; of requests that have no budget of their own.
        own: the layers and heads of the layout that this rank owns.
        heads: of this rank.
        cache_dtype: of the KV cache.
        max_requests: that run at once.
        max_tokens: the longest prompt, or the tokens of a step if they are more.
        max_programs: programs to spread decode attention over, at most; `spread` sets fewer.
        device: where the kernels run.
        recorder: of the kept tokens, if someone wants to know.
        max_decode_queries: rows with more are not taken for decodes.
        recorded_queries: whose attention can be recorded; see `AttentionRecorder`.
        query_dtype: type of the queries; the cache's if not given, bfloat16 beside fp8.
        max_pages: head pages of a request at most, if their places are to be listed once; 0 if the
            decode kernel computes them, see `HeadPages.page_units`.
    """

    def __init__(
        self,
        layout: CacheLayout,
        own: tuple[slice, slice],
        heads: Heads,
        cache_dtype: torch.dtype,
        max_requests: int,
        max_tokens: int,
        max_programs: int,
        device: torch.device,
        recorder: KeptRecorder | None = None,
        max_decode_queries: int = DECODE_QUERIES,
        recorded_queries: int = 0,
        query_dtype: torch.dtype | None = None,
        max_pages: int = 0,
    ) -> None:
        self.layout = layout
        self.own = own
        self.heads = heads
        self.recorder = recorder
        self.max_decode_queries = max(DECODE_QUERIES, max_decode_queries)
        self.ops = choose_ops(device)
        self.prune_timer = PruneTimer(device)
        self.layouts = [layout] * max_requests
        self.request_ids = [""] * max_requests
        self.prompt_tokens = np.zeros(max_requests, dtype=np.int64)
        self.compact_blocks = np.zeros(max_requests, dtype=np.int64)
        self.max_kept = np.zeros(max_requests, dtype=np.int64)
        self.seeds = [0] * max_requests
        self.pages = HeadPages.empty(max_requests, heads.L, heads.Hkv, device, max_pages)
        self.workspace = PruneWorkspace.allocate(
            max_tokens, heads.Hq, heads.Hkv, layout.window, device
        )
        max_rows = decode_rows(heads.D, cache_dtype)
        self.knockouts = Knockouts(own, layout.window)
        self.attention: AttentionRecorder | None = None
        if recorded_queries:
            self.attention = AttentionRecorder(
                heads.L, heads.Hq, heads.G, max_rows, recorded_queries, max_requests, device
            )
        lengths = range(1, self.max_decode_queries + 1)
        tiles = max(-(-q // decode_queries(q, heads.G, max_rows)) for q in lengths)
        sizes = max_requests * tiles, heads.L, heads.Hkv, heads.D, cache_dtype, max_programs
        self.buffers = DecodeBuffers.allocate(*sizes, device, query_dtype)
        self.poison: Poison | None = None
        self._programs: dict[int, int] = {}
        self._cache: PrunedCache | None = None

    @property
    def cache(self) -> PrunedCache:
        """The KV cache, which vLLM allocates last."""
        assert self._cache is not None, "vLLM has not allocated the KV cache yet"
        return self._cache

    def attach(self, cache: PrunedCache) -> None:
        """Work on this cache from now on."""
        self._cache = cache

    def detach(self) -> None:
        """Let go of the cache, so that its memory is free for another."""
        self._cache = self.poison = None

    @property
    def page_size(self) -> int:
        """Tokens of a block, `P`."""
        return self.cache.tensor.shape[3]

    def add(
        self,
        index: int,
        prompt_tokens: int,
        request_id: str = "",
        seed: int = 0,
        layout: CacheLayout | None = None,
    ) -> None:
        """Enter a request; overwrites what had the index before. Does not wait for the device.

        Args:
            index: index of the request.
            prompt_tokens: tokens of its prompt, `n`.
            request_id: name under which its kept tokens are recorded.
            seed: seed of random scores.
            layout: layout by the request's own budget, if it has one.
        """
        layout = layout or self.layout
        lengths = layout.kept_tokens(prompt_tokens)[self.own]
        head_pages = -(-lengths // self.page_size)
        first_pages = head_pages.cumsum().reshape(head_pages.shape) - head_pages
        self.layouts[index] = layout
        self.request_ids[index] = request_id
        self.prompt_tokens[index] = prompt_tokens
        self.compact_blocks[index] = layout.compact_blocks(prompt_tokens, self.page_size)
        self.max_kept[index] = layout.most_kept(prompt_tokens, self.own)
        self.seeds[index] = seed
        self.pages.enter(
            index,
            prompt_tokens,
            int(self.compact_blocks[index]),
            torch.from_numpy(lengths),
            torch.from_numpy(first_pages),
        )

    def spread(self, block_m: int, programs: int) -> None:
        """Spread decode batches over this many programs from now on, as far as buffers are there.

        Args:
            block_m: rows of a query tile, for which the decode kernel is compiled.
            programs: programs that the device runs at once.
        """
        self._programs[block_m] = min(programs, self.buffers.max_programs)

    def decode_batch(self, first_row: int, rows: int, max_query_len: int) -> DecodeBatch:
        """Rows for `sparse_decode`, in the persistent buffers."""
        return self._batch(self.buffers, first_row, rows, max_query_len)

    def long_decode_batch(self, row: int, query_len: int) -> DecodeBatch:
        """A row with more queries than the persistent buffers are made for, in its own ones.

        Only a resumed request recomputes so many tokens behind a pruned prompt.
        """
        block_q = decode_queries(query_len, self.heads.G, self.buffers.max_rows)
        buffers = self.buffers.for_tiles(-(-query_len // block_q), self.heads.Hkv)
        return self._batch(buffers, row, 1, query_len)

    def _batch(
        self, buffers: DecodeBuffers, first_row: int, rows: int, max_query_len: int
    ) -> DecodeBatch:
        units = self.pages.page_units
        batch = DecodeBatch.of(
            buffers, first_row, rows, max_query_len, self.heads.G, page_units=units
        )
        return replace(batch, programs=self._programs.get(batch.block_m, batch.programs))

    def prune(
        self,
        layer: int,
        query: torch.Tensor,
        block_table: torch.Tensor,
        prompts: Prompts,
        scale: float,
        k_scale: torch.Tensor | None,
    ) -> None:
        """Score, select and compact the prompts of one layer.

        Args:
            layer: index in the cache.
            query: the step's queries, ``[T, Hq, D]``.
            block_table: int32 ``[R, max_blocks]``.
            prompts: that this step completes.
            scale: of the attention logits.
            k_scale: of an fp8 cache's keys.
        """
        layout, workspace, cache = self.layout, self.workspace, self.cache.tensor
        if layout.rules.token_scores is not None:
            score_at_random(layout, self.own, layer, prompts, self.seeds, workspace)
        else:
            self.ops.window_scores(
                query,
                cache[layer],
                block_table,
                prompts,
                workspace,
                layout.window,
                layout.pool_kernel,
                scale,
                k_scale,
            )
        if layout.rules.split is not None:
            split_layer(self.layouts, layer, prompts, workspace, self.pages, self.page_size)
        self.ops.select_tokens(prompts, workspace, self.pages.lengths[:, layer], layout.window)
        if self.recorder is not None:
            self._record(self.recorder, layer, prompts)
        self.ops.compact_kv(cache, layer, block_table, prompts, workspace, self.pages)

    def _record(self, recorder: KeptRecorder, layer: int, prompts: Prompts) -> None:
        """Write down what each head keeps. Waits for the device."""
        for _, request, _, n, offset in prompts.entries:
            lengths = self.pages.lengths[request, layer]
            kept = self.workspace.positions[:, offset : offset + int(self.max_kept[request])]
            recorder.add(self.request_ids[request], kept, lengths, n)


@dataclass(frozen=True)
class Step:
    """A step's batch, sorted by what SPARSEMM does with each request.

    Attributes:
        state: what outlives the step.
        short_rows: leading rows that the decode kernel computes, pruned or not.
        pruned_rows: later rows that attend to a pruned prompt.
        moves_slots: whether generated tokens of any row lie behind compact blocks.
        max_query_len: the most queries of a row.
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

    def prepare(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        block_table: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        requests: torch.Tensor,
    ) -> None:
        """Correct the slots of generated tokens and schedule the decode rows, on the device.

        Args:
            slots: cache slot of each token of the step, int64 ``[T]``; changed in place.
            positions: of each token in its request, int64 ``[T]``.
            block_table: int32 ``[R, max_blocks]``.
            query_start: first query of each row and the end of the last, int32 ``[R + 1]``.
            seq_lens: tokens of each row after the step, int32 ``[R]``.
            requests: index of each row's request, of the real rows only.
        """
        state = self.state
        if self.moves_slots:
            state.ops.correct_slots(
                slots,
                positions,
                block_table,
                query_start,
                seq_lens,
                requests,
                state.pages,
                state.page_size,
                self.max_query_len,
            )
        if state.pages.page_units is not None:
            for prompts in self.prunes:
                state.ops.list_pages(state.cache.tensor, block_table, prompts, state.pages)
        for batch in self.decodes:
            state.ops.schedule_decode(
                batch,
                state.pages,
                state.layout.window,
                state.page_size,
                query_start,
                seq_lens,
                requests,
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
        state: the running requests.
        requests: index of each request, ``[R]``.
        query_start: first query of each request, and the end of the last, ``[>= R + 1]``.
        max_seq_lens: bound of each request's tokens after the step, ``[>= R]``; exact for rows
            that compute a prompt.
        rows: of the batch, if it is padded for a CUDA graph.

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
