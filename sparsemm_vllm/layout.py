"""What a pruned request holds: tokens per head, head pages, blocks. Exact, from the prompt length.

How many tokens each head keeps depends on the profile and on the prompt's length only, never on
data, so the scheduler counts blocks with these functions and the workers place pages with them.
Knows nothing of vLLM.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sparsemm_vllm.budget import head_capacities


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class CacheLayout:
    """Budgets of a model and how its heads are spread over ranks; immutable and hashable.

    All ranks and the scheduler hold equal copies.

    Args:
        capacities: ``[L][Hkv]`` tokens besides the window, of the whole model's pruned layers.
        window: observation window `W`, in tokens.
        base: budget less window, in tokens; a prompt is pruned if it has as many older tokens.
        pool_kernel: width of the score pooling, in tokens.
        min_prompt_tokens: shorter prompts are left dense.
        stages: ``(first, last + 1)`` pruned layer of each pipeline stage.
        tensor_parallel: ranks that share the KV heads of each layer.

    Raises:
        ValueError: if the heads do not divide among the ranks, or a stage has no pruned layer.
    """

    capacities: tuple[tuple[int, ...], ...]
    window: int
    base: int
    pool_kernel: int = 5
    min_prompt_tokens: int = 0
    stages: tuple[tuple[int, int], ...] = ()
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if not self.stages:
            object.__setattr__(self, "stages", ((0, len(self.capacities)),))
        heads = len(self.capacities[0])
        if heads % self.tensor_parallel:
            raise ValueError(
                f"{heads} KV heads cannot be divided among {self.tensor_parallel} tensor-parallel "
                "ranks; use a tensor-parallel size that divides the KV heads"
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
        **options: int | tuple[tuple[int, int], ...],
    ) -> "CacheLayout":
        """The layout of a model with these visual scores ``[L, Hq]``; see `head_capacities`."""
        capacities = head_capacities(scores, num_kv_heads, budget, window, rho).tolist()
        return cls(
            tuple(map(tuple, capacities)),
            window=window,
            base=budget - window,
            **options,  # type: ignore[arg-type]
        )

    @property
    def last_chunk(self) -> int:
        """Fewest tokens in the chunk that ends a pruned prompt: the window, and never one.

        vLLM runs chunks of one token as decodes, where nothing is pruned.
        """
        return max(self.window, 2)

    @cached_property
    def _table(self) -> np.ndarray:
        return np.array(self.capacities, dtype=np.int64)

    def is_pruned(self, prompt_tokens: int) -> bool:
        """Whether a prompt of that many tokens is pruned when it has been computed."""
        older = prompt_tokens - self.window
        return older >= self.base and prompt_tokens >= self.min_prompt_tokens

    def slice_of(self, stage: int, rank: int) -> tuple[slice, slice]:
        """The pruned layers and KV heads that a rank owns."""
        heads = len(self.capacities[0]) // self.tensor_parallel
        return slice(*self.stages[stage]), slice(rank * heads, (rank + 1) * heads)

    def kept_tokens(self, prompt_tokens: int) -> np.ndarray:
        """Tokens in each head's pages, the window not among them: int64 ``[L, Hkv]``.

        All zero for a prompt that is not pruned: its tokens stay where they are.
        """
        if not self.is_pruned(prompt_tokens):
            return np.zeros_like(self._table)
        return np.minimum(self._table, prompt_tokens - self.window)

    def compact_blocks(self, prompt_tokens: int, block_size: int) -> int:
        """Blocks `C` for the head pages of a pruned prompt: the most that any rank needs."""
        pages = -(-self.kept_tokens(prompt_tokens) // block_size)
        needs = []
        for stage in range(len(self.stages)):
            for rank in range(self.tensor_parallel):
                own = pages[self.slice_of(stage, rank)]
                needs.append(_ceil_div(int(own.sum()), own.size))
        return max(needs)

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
