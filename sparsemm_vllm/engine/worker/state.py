"""What a rank keeps between steps: the running requests, and the kernels' memory."""

from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.worker.probes.attention import AttentionRecorder
from sparsemm_vllm.engine.worker.probes.kept import KeptRecorder
from sparsemm_vllm.engine.worker.probes.knockout import Knockouts
from sparsemm_vllm.engine.worker.probes.poison import Poison
from sparsemm_vllm.engine.worker.prune_timer import PruneTimer
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, PruneWorkspace
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.tile_sizes import decode_queries, decode_rows

# Queries of a row that the decode kernel is made for.
DECODE_QUERIES = 16


@dataclass(frozen=True)
class Heads:
    """Attention heads of a rank's pruned layers.

    Attributes:
        L: pruned layers.
        Hq: query heads.
        Hkv: KV heads.
        D: head size, in elements.
        dtype: type of the KV cache.
        query_dtype: type of the queries; the cache's if not given, bfloat16 beside fp8.
    """

    L: int
    Hq: int
    Hkv: int
    D: int
    dtype: torch.dtype
    query_dtype: torch.dtype | None = None

    @property
    def G(self) -> int:  # noqa: N802
        """Query heads of a KV head."""
        return self.Hq // self.Hkv


@dataclass(frozen=True)
class Capacity:
    """What a rank's memory is made for.

    Attributes:
        requests: requests that run at once.
        tokens: tokens of the longest prompt, or of a step if they are more.
        programs: programs to spread decode attention over, at most; `SparseState.spread` sets
            fewer.
        decode_queries: queries of a row, at most, that is taken for a decode.
        recorded_queries: queries whose attention can be recorded; see `AttentionRecorder`.
        pages: head pages of a request, at most, if their places are to be listed once; 0 if the
            decode kernel computes them, see `HeadPages.page_units`.
    """

    requests: int
    tokens: int
    programs: int
    decode_queries: int = DECODE_QUERIES
    recorded_queries: int = 0
    pages: int = 0


@dataclass(frozen=True)
class PrunedCache:
    """The KV cache of a rank's pruned layers, seen as one tensor.

    Attributes:
        tensor: keys and values of all pruned layers, ``[L, B, Hkv, P, 2 * D]``.
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
        layout: layout of the whole model, for requests without a budget of their own.
        own: pruned layers and KV heads of the layout that this rank has.
        heads: heads of this rank.
        capacity: sizes of the memory.
        device: device of the kernels.
        recorder: recorder of the kept tokens, if someone wants to know.
    """

    def __init__(
        self,
        layout: CacheLayout,
        own: tuple[slice, slice],
        heads: Heads,
        capacity: Capacity,
        device: torch.device,
        recorder: KeptRecorder | None = None,
    ) -> None:
        requests, G = capacity.requests, heads.G
        self.layout = layout
        self.own = own
        self.heads = heads
        self.recorder = recorder
        self.max_decode_queries = max(DECODE_QUERIES, capacity.decode_queries)
        self.ops = choose_ops(device)
        self.prune_timer = PruneTimer(device)
        self.layouts = [layout] * requests
        self.request_ids = [""] * requests
        self.prompt_tokens = np.zeros(requests, dtype=np.int64)
        self.compact_blocks = np.zeros(requests, dtype=np.int64)
        self.max_kept = np.zeros(requests, dtype=np.int64)
        self.seeds = [0] * requests
        self.pages = HeadPages.empty(requests, heads.L, heads.Hkv, device, capacity.pages)
        self.workspace = PruneWorkspace.allocate(
            capacity.tokens, heads.Hq, heads.Hkv, layout.window, device
        )
        max_rows = decode_rows(heads.D, heads.dtype)
        self.knockouts = Knockouts(own, layout.window)
        self.attention: AttentionRecorder | None = None
        if capacity.recorded_queries:
            self.attention = AttentionRecorder(
                heads.L, heads.Hq, G, max_rows, capacity.recorded_queries, requests, device
            )
        lengths = range(1, self.max_decode_queries + 1)
        tiles = max(-(-q // decode_queries(q, G, max_rows)) for q in lengths)
        sizes = requests * tiles, heads.L, heads.Hkv, heads.D, heads.dtype, capacity.programs
        self.buffers = DecodeBuffers.allocate(*sizes, device, heads.query_dtype)
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
