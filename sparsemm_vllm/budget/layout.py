"""What a pruned request holds: tokens per head, head pages, blocks. Exact, from the prompt length.

How many tokens each head keeps depends on the profile and on the prompt's length only, never on
data, so the scheduler counts blocks with these functions and the workers place pages with them.
The exception are methods that split a layer's tokens among its heads by their scores (AdaKV): of
these the layer's pages are counted, as many as any split may need.
Knows nothing of vLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsemm_vllm.budget.methods import METHODS, Budget, Method
from sparsemm_vllm.budget.redistribute import redistribute

if TYPE_CHECKING:  # the benchmarks of kernels run where there is no pydantic
    from sparsemm_vllm.budget.settings import Settings

GRID = 64  # prompt lengths looked at for the most blocks that any needs
KEPT_BYTES = 2**22  # bytes of kept tokens that are remembered, over all budgets
COUNTS = 4096  # counts of blocks that are remembered, over all budgets
BUDGETS = 64  # budgets of requests whose layouts are remembered


def smallest_last_chunk(window: int) -> int:
    """Fewest tokens in the chunk that ends a pruned prompt: the window, and never one.

    vLLM runs chunks of one token as decodes, where nothing is pruned.
    """
    return max(window, 2)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class CacheLayout:
    """Budgets of a model and how its heads are spread over ranks; immutable and hashable.

    All ranks and the scheduler hold equal copies.

    Args:
        capacities: tokens that each KV head keeps besides the window, ``[L][Hkv]``, for all pruned
            layers of the model; the prompt may be too short for some of them.
        window: observation window `W`, in tokens.
        base: budget less window, in tokens; a prompt is pruned if it has as many older tokens.
        pool_kernel: width of the score pooling, in tokens.
        min_prompt_tokens: length of the shortest prompt that is pruned, in tokens.
        stages: pruned layers of each pipeline stage, ``(first, last + 1)``, from 0.
        tensor_parallel: ranks that share the KV heads of each layer.
        method: name in `METHODS`.
        redistribute: whether the others get what heads cannot use of a short prompt.
        scores: visual scores ``[L][Hq]``, for requests that ask for another budget.
        rho: share of each budget that is spread evenly, 0 to 1.
        largest_budget: largest budget that a request may ask for, in tokens, window included; 0 if
            all requests have the same.

    Raises:
        ValueError: if the heads do not divide among the ranks, or must not be divided, or a stage
            has no pruned layer.
    """

    capacities: tuple[tuple[int, ...], ...]
    window: int
    base: int
    pool_kernel: int = 5
    min_prompt_tokens: int = 0
    stages: tuple[tuple[int, int], ...] = ()
    tensor_parallel: int = 1
    method: str = "sparsemm"
    redistribute: bool = False
    scores: tuple[tuple[float, ...], ...] = ()
    rho: float = 0.1
    largest_budget: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            object.__setattr__(self, "stages", ((0, len(self.capacities)),))
        heads = len(self.capacities[0])
        if heads % self.tensor_parallel:
            raise ValueError(
                f"{heads} KV heads cannot be divided among {self.tensor_parallel} tensor-parallel "
                "ranks; use a tensor-parallel size that divides the KV heads"
            )
        if self.rules.split is not None and self.tensor_parallel > 1:
            raise ValueError(
                f"method {self.method} compares the scores of all heads of a layer, and each of "
                f"{self.tensor_parallel} tensor-parallel ranks has only some of them; use pipeline "
                "parallelism, or another method"
            )
        for rank, (first, end) in enumerate(self.stages):
            if first >= end:
                raise ValueError(f"pipeline stage {rank} has no layer that SPARSEMM can prune")

    @classmethod
    def from_scores(
        cls,
        scores: torch.Tensor,
        num_kv_heads: int,
        budget: int,
        window: int = 32,
        rho: float = 0.1,
        method: str = "sparsemm",
        **options: Any,
    ) -> "CacheLayout":
        """The layout of a model with these visual scores ``[L, Hq]``; see `Budget`."""
        share = Budget(scores, num_kv_heads, budget, window, rho)
        capacities = METHODS[method].capacities(share).tolist()
        return cls(
            tuple(map(tuple, capacities)),
            window=window,
            base=share.base,
            method=method,
            scores=tuple(map(tuple, scores.tolist())),
            rho=rho,
            **options,
        )

    @classmethod
    def from_settings(
        cls, settings: "Settings", scores: torch.Tensor, num_kv_heads: int, **placement: Any
    ) -> "CacheLayout":
        """The layout of a server with these settings.

        Args:
            settings: settings of the server; their profile is not looked at.
            scores: visual scores of the pruned layers, ``[L, Hq]``.
            num_kv_heads: KV heads of a layer, ``Hkv``; divides ``Hq``.
            placement: arguments of `CacheLayout` that say how heads are spread over ranks.
        """
        return cls.from_scores(
            scores,
            num_kv_heads,
            settings.budget,
            settings.window,
            settings.rho,
            settings.method,
            redistribute=settings.redistribute,
            pool_kernel=settings.pool_kernel,
            min_prompt_tokens=settings.min_prompt_tokens,
            largest_budget=settings.largest_budget,
            **placement,
        )

    @cached_property
    def dense(self) -> "CacheLayout":
        """The same model, of a request whose prompt stays whole."""
        return replace(self, method="full")

    def of_budget(self, tokens: int) -> "CacheLayout":
        """The layout of a request with another budget, window included, from the same scores.

        Raises:
            ValueError: for a budget not larger than the window.
        """
        return self._remembered.of_budget(tokens)

    @property
    def _budget(self) -> int:
        return self.window + self.base

    @cached_property
    def _remembered(self) -> "_Remembered":
        return _Remembered(self)

    def _make_of_budget(self, tokens: int) -> "CacheLayout":
        if tokens == self._budget:
            return self
        scores = torch.tensor(self.scores, dtype=torch.float64)
        share = Budget(scores, len(self.capacities[0]), tokens, self.window, self.rho)
        capacities = self.rules.capacities(share).tolist()
        other = replace(self, capacities=tuple(map(tuple, capacities)), base=share.base)
        other.__dict__["_remembered"] = self._remembered  # one memory for all budgets
        return other

    def __getstate__(self) -> dict[str, Any]:
        """The arguments; what is remembered stays behind."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def rules(self) -> Method:
        """What the method does in its particular way."""
        return METHODS[self.method]

    @property
    def last_chunk(self) -> int:
        """See `smallest_last_chunk`."""
        return smallest_last_chunk(self.window)

    @cached_property
    def _table(self) -> np.ndarray:
        return np.array(self.capacities, dtype=np.int64)

    def is_pruned(self, prompt_tokens: int) -> bool:
        """Whether a prompt of that many tokens is pruned when it has been computed."""
        older = prompt_tokens - self.window
        long_enough = older >= self.base and prompt_tokens >= self.min_prompt_tokens
        return long_enough and self.rules.prunes

    def slice_of(self, stage: int, rank: int) -> tuple[slice, slice]:
        """The pruned layers and KV heads of a rank.

        Args:
            stage: pipeline stage, from 0.
            rank: tensor-parallel rank, from 0.
        """
        heads = len(self.capacities[0]) // self.tensor_parallel
        return slice(*self.stages[stage]), slice(rank * heads, (rank + 1) * heads)

    def kept_tokens(self, prompt_tokens: int) -> np.ndarray:
        """The number of kept tokens in each head's pages, without the window: int64 ``[L, Hkv]``.

        All zero for a prompt that is not pruned: its tokens stay where they are. A method that
        splits a layer by the prompt's scores decides later: then, what equal scores would give.
        """
        if not self.is_pruned(prompt_tokens):
            return np.zeros_like(self._table)
        return self._kept(prompt_tokens).copy()

    def _kept(self, prompt_tokens: int) -> np.ndarray:
        """`kept_tokens` of a pruned prompt, shared by all who ask: not to be written to."""
        return self._remembered.kept(self._budget, prompt_tokens)

    def _count_kept(self, prompt_tokens: int) -> np.ndarray:
        older = prompt_tokens - self.window
        wanted = torch.from_numpy(self._table)
        if (shorten := self.rules.shorten) is not None:
            wanted = shorten(wanted, self.base, older)
        if self.redistribute:
            wanted = redistribute(wanted, prompt_tokens, self.window)
        if (total := self.rules.split_total) is not None:
            wanted = wanted.clamp(max=total(1, self.base))
        return wanted.clamp(max=older).long().numpy()

    def mean_kept(self, prompt_tokens: int) -> float:
        """Prompt tokens that a KV head keeps on average, the window among them."""
        if not self.is_pruned(prompt_tokens):
            return float(prompt_tokens)
        return float(self._kept(prompt_tokens).mean()) + self.window

    def most_kept(self, prompt_tokens: int, rank_slice: tuple[slice, slice]) -> int:
        """Most tokens in the pages of any head of a rank.

        Args:
            prompt_tokens: length `n` of the prompt, in tokens.
            rank_slice: layers and KV heads of the rank, from `slice_of`.
        """
        if not self.is_pruned(prompt_tokens):
            return 0
        if self.rules.split is not None:
            return min(prompt_tokens - self.window, self._layer_tokens)
        return int(self._kept(prompt_tokens)[rank_slice].max())

    @property
    def _layer_tokens(self) -> int:
        """Most tokens that a layer keeps, of a method that splits layers by scores."""
        total = self.rules.split_total
        assert total is not None
        return total(len(self.capacities[0]), self.base)

    def layer_pages(self, prompt_tokens: int, block_size: int) -> int:
        """Head pages that suffice for any split of a layer's tokens among its heads."""
        heads, older = len(self.capacities[0]), prompt_tokens - self.window
        rounded_up = (self._layer_tokens + heads * (block_size - 1)) // block_size
        return min(rounded_up, heads * _ceil_div(older, block_size))

    def compact_blocks(self, prompt_tokens: int, block_size: int) -> int:
        """Blocks `C` for the head pages of a pruned prompt: the most that any rank needs.

        At least one, even if no head keeps a token: by these blocks the scheduler and the kernels
        tell a pruned prompt from one that is not.
        """
        return self._remembered.blocks(self._budget, prompt_tokens, block_size)

    def _count_blocks(self, prompt_tokens: int, block_size: int) -> int:
        if not self.is_pruned(prompt_tokens):
            return 0
        if self.rules.split is not None:
            return _ceil_div(self.layer_pages(prompt_tokens, block_size), len(self.capacities[0]))
        return self._blocks_of(self._kept(prompt_tokens), block_size)

    def _blocks_of(self, kept: np.ndarray, block_size: int) -> int:
        """Blocks for heads that keep this much, ``[L, Hkv]``, on the rank that needs most."""
        pages = -(-kept // block_size)
        needs = [1]
        for stage in range(len(self.stages)):
            for rank in range(self.tensor_parallel):
                of_rank = pages[self.slice_of(stage, rank)]
                needs.append(_ceil_div(int(of_rank.sum()), of_rank.size))
        return max(needs)

    def most_compact_blocks(self, longest: int, block_size: int) -> int:
        """Compact blocks that suffice for every prompt of up to `longest` tokens and any budget."""
        return self._remembered.most_blocks(self._budget, longest, block_size)

    def _count_most_blocks(self, longest: int, block_size: int) -> int:
        if not self.rules.prunes:
            return 0
        most = self._most_of_this_budget(longest, block_size)
        prunable = longest > max(self.window, self.min_prompt_tokens - 1)
        if self.largest_budget and prunable:
            largest = self.of_budget(self.largest_budget)
            most = max(most, largest._most_of_smaller_budgets(longest, block_size))
        return most

    def _most_of_this_budget(self, longest: int, block_size: int) -> int:
        """Compact blocks that suffice for every prompt of up to `longest` tokens.

        Where capacities depend on the prompt, a longer one may need fewer, so lengths on a grid are
        looked at. With a token more in the prompt no head keeps more than a token more: that covers
        what lies between.
        """
        fixed = self.rules.shorten is None and not self.redistribute
        if fixed or self.rules.split is not None:
            return self.compact_blocks(longest, block_size)
        first = max(self.window + self.base, self.min_prompt_tokens)
        last = min(longest, max(first, self.window + int(self._table.max())))  # then all is given
        step = max(1, _ceil_div(last - first, GRID))
        needs = [
            self._blocks_of(self._count_kept(n) + step - 1, block_size)
            for n in range(first, last + 1, step)
        ]
        return max(needs, default=0)

    def _most_of_smaller_budgets(self, longest: int, block_size: int) -> int:
        """Compact blocks that suffice for every such prompt with a budget of at most this one.

        A smaller budget gives no head, or of AdaKV no layer, more than this one does, whether or
        not this one would prune the prompt. Where heads' tokens depend on the prompt only their
        total does not, and pages, less than full, spread it over `P - 1` tokens more per head.
        """
        older, (L, heads) = longest - self.window, self._table.shape
        if self.rules.split is not None:
            return _ceil_div(self.layer_pages(longest, block_size), heads)
        if self.rules.shorten is None and not self.redistribute:
            return self._blocks_of(self._table.clip(max=older), block_size)
        total = int(self._table.sum())
        if self.rules.shorten is not None:  # by half a layer at most above the base: steps round
            total = (self.base + L) * L * heads
        fewest = min(end - first for first, end in self.stages) * heads // self.tensor_parallel
        kept = min(total, fewest * older)
        return max(1, _ceil_div(kept + fewest * (block_size - 1), fewest * block_size))

    def freed_blocks(self, prompt_tokens: int, block_size: int) -> int:
        """Prompt blocks, counted from the first, that go back to the pool after pruning."""
        if not self.is_pruned(prompt_tokens):
            return 0
        return (prompt_tokens - self.window) // block_size

    def held_blocks(self, prompt_tokens: int, total_tokens: int, block_size: int) -> int:
        """Blocks that a request of `total_tokens` tokens holds after its prompt was pruned."""
        return (
            _ceil_div(total_tokens, block_size)
            - self.freed_blocks(prompt_tokens, block_size)
            + self.compact_blocks(prompt_tokens, block_size)
        )


class _Remembered:
    """What has been counted for a server's layout, and for those of requests with other budgets.

    The scheduler asks for the blocks of a waiting request in every step, and a worker for its kept
    tokens more than once, but redistribution looks at every head. What was asked for longest ago is
    forgotten first.

    Args:
        server: layout of the server; layouts of other budgets are made from it.

    Attributes:
        of_budget: layout by budget, window included, in tokens.
        kept: kept tokens, int64 ``[L, Hkv]``, by budget and prompt length.
        blocks: compact blocks by budget, prompt length and block size.
        most_blocks: most compact blocks by budget, longest prompt and block size.
    """

    def __init__(self, server: CacheLayout) -> None:
        def remembered(count: Callable[..., Any], entries: int) -> Callable[..., Any]:
            return lru_cache(entries)(
                lambda budget, *sizes: count(server.of_budget(budget), *sizes)
            )

        self.of_budget = lru_cache(BUDGETS)(server._make_of_budget)
        self.kept = remembered(CacheLayout._count_kept, max(1, KEPT_BYTES // server._table.nbytes))
        self.blocks = remembered(CacheLayout._count_blocks, COUNTS)
        self.most_blocks = remembered(CacheLayout._count_most_blocks, COUNTS)
