"""What a budget costs and saves: KV memory of one request, and how many requests fit."""

import math
from dataclasses import dataclass, replace

import numpy as np

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.errors import UserError

GB = 10**9
HEAD_SIZE = 128
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}


class PlanError(UserError):
    """A plan for sizes that cannot be."""


@dataclass(frozen=True)
class Plan:
    """KV cache of one request, dense and pruned, over all layers and ranks.

    Attributes:
        model_id: name of the model.
        method, redistribute, budget, window, rho: settings of the server; see `Settings`.
        prompt_tokens, answer_tokens, block_size, head_size: sizes that were asked for; see
            `make_plan`.
        dtype: data type of the cache.
        pruned: whether the prompt is longer than what the budget covers.
        kept_min, kept_median, kept_mean, kept_max: prompt tokens per KV head, window included.
        block_bytes: size of a block over all layers, in bytes.
        dense_blocks, peak_blocks, pruned_blocks: numbers of blocks; see `Blocks`.
        dense_bytes, peak_bytes, pruned_bytes: sizes of these blocks, in bytes.
        dense_ideal_bytes, ideal_bytes: sizes of a dense and of a pruned request's tokens, in bytes,
            not rounded to pages and blocks.
        kv_memory_bytes: size of the whole cache, in bytes; none if it is not known.
        dense_requests: number of dense requests that fit into it at once.
        pruned_requests: number of pruned ones that fit at once, one in the step that prunes.
    """

    model_id: str
    method: str
    redistribute: bool
    budget: int
    window: int
    rho: float
    prompt_tokens: int
    answer_tokens: int
    block_size: int
    head_size: int
    dtype: str
    pruned: bool
    kept_min: int
    kept_median: float
    kept_mean: float
    kept_max: int
    block_bytes: int
    dense_blocks: int
    peak_blocks: int
    pruned_blocks: int
    dense_bytes: int
    peak_bytes: int
    pruned_bytes: int
    dense_ideal_bytes: int
    ideal_bytes: int
    kv_memory_bytes: int | None = None
    dense_requests: int | None = None
    pruned_requests: int | None = None


def check_sizes(least: int = 1, **sizes: int) -> None:
    """Refuse sizes below `least` or beyond 32 bits, by the name of the option.

    Raises:
        PlanError: naming the first of them.
    """
    for name, size in sizes.items():
        if not least <= size < 2**31:
            option = f"--{name.replace('_', '-')}"
            raise PlanError(f"{option} is {size}; it must be at least {least} and less than 2^31")


def printable(text: str) -> str:
    """Text from a file on one line, without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def build_layout(profile: HeadProfile, settings: Settings) -> CacheLayout:
    """The cache layout that a server with these settings would have on one rank."""
    return CacheLayout.from_settings(settings, profile.tensor(), profile.num_kv_heads)


def tokens_per_head(layout: CacheLayout, prompt_tokens: int) -> np.ndarray:
    """Prompt tokens that each KV head keeps, the window included: int64 ``[L, Hkv]``.

    Of AdaKV the mean of each layer: a head's own number depends on the prompt.
    """
    if not layout.is_pruned(prompt_tokens):
        return np.full(np.shape(layout.capacities), prompt_tokens)
    return layout.kept_tokens(prompt_tokens) + layout.window


@dataclass(frozen=True)
class Blocks:
    """KV blocks that one request holds.

    Attributes:
        dense: number of blocks if nothing is pruned.
        peak: number of blocks in the step that prunes, when both copies of the prompt exist.
        pruned: number of blocks after it.
    """

    dense: int
    peak: int
    pruned: int


def count_blocks(
    layout: CacheLayout, prompt_tokens: int, total_tokens: int, block_size: int
) -> Blocks:
    """Count the KV blocks of a request, with the functions that the scheduler counts with.

    Args:
        layout: cache layout of the request.
        prompt_tokens: length of the prompt, in tokens.
        total_tokens: length of the prompt and the answer so far, in tokens.
        block_size: tokens in a KV block.
    """
    prompt_blocks = -(-prompt_tokens // block_size)
    return Blocks(
        dense=-(-total_tokens // block_size),
        peak=prompt_blocks + layout.compact_blocks(prompt_tokens, block_size),
        pruned=layout.held_blocks(prompt_tokens, total_tokens, block_size),
    )


def make_plan(
    profile: HeadProfile,
    settings: Settings,
    prompt_tokens: int,
    *,
    answer_tokens: int = 0,
    kv_memory: float | None = None,
    block_size: int = 16,
    head_size: int = HEAD_SIZE,
    dtype: str = "bfloat16",
) -> Plan:
    """Count blocks and bytes with the functions that the scheduler counts with.

    Args:
        profile: scores of the model's heads; all layers count as full attention.
        settings: settings of the server; their profile is not looked at.
        prompt_tokens: length of the prompt, in tokens.
        answer_tokens: length of the answer so far, in tokens; every head keeps them all.
        kv_memory: size of the whole KV cache over all ranks, in GB of 10^9 bytes.
        block_size: tokens in a KV block.
        head_size: size of a head, in elements.
        dtype: data type of the cache, one of `DTYPE_BYTES`.

    Raises:
        PlanError: for a size that is not positive, or an unknown dtype.
    """
    check_sizes(prompt_tokens=prompt_tokens, block_size=block_size, head_size=head_size)
    check_sizes(0, answer_tokens=answer_tokens)
    _check_cache(kv_memory, dtype)
    layout = build_layout(profile, settings)
    kept = tokens_per_head(layout, prompt_tokens)
    total_tokens = prompt_tokens + answer_tokens
    blocks = count_blocks(layout, prompt_tokens, total_tokens, block_size)
    token_bytes = 2 * head_size * DTYPE_BYTES[dtype]  # of one head: a key and a value
    block_bytes = kept.size * block_size * token_bytes
    plan = Plan(
        model_id=profile.model_id,
        method=settings.method,
        redistribute=settings.redistribute,
        budget=settings.budget,
        window=settings.window,
        rho=settings.rho,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        block_size=block_size,
        head_size=head_size,
        dtype=dtype,
        pruned=layout.is_pruned(prompt_tokens),
        kept_min=int(kept.min()),
        kept_median=float(np.median(kept)),
        kept_mean=float(kept.mean()),
        kept_max=int(kept.max()),
        block_bytes=block_bytes,
        dense_blocks=blocks.dense,
        peak_blocks=blocks.peak,
        pruned_blocks=blocks.pruned,
        dense_bytes=blocks.dense * block_bytes,
        peak_bytes=blocks.peak * block_bytes,
        pruned_bytes=blocks.pruned * block_bytes,
        dense_ideal_bytes=kept.size * total_tokens * token_bytes,
        ideal_bytes=(int(kept.sum()) + kept.size * answer_tokens) * token_bytes,
    )
    return plan if kv_memory is None else _with_memory(plan, layout, round(kv_memory * GB))


def _check_cache(kv_memory: float | None, dtype: str) -> None:
    if kv_memory is not None and not (math.isfinite(kv_memory) and kv_memory > 0):
        raise PlanError(f"--kv-memory is {kv_memory:g} GB; it must be larger than 0")
    if dtype not in DTYPE_BYTES:
        raise PlanError(f"--dtype is {dtype!a}; known are {', '.join(DTYPE_BYTES)}")


def _with_memory(plan: Plan, layout: CacheLayout, memory: int) -> Plan:
    """The plan with the requests that fit at once into a cache of so many bytes."""
    blocks = memory // plan.block_bytes - 1  # vLLM keeps one block that holds nothing
    total_tokens = plan.prompt_tokens + plan.answer_tokens
    fit, fit_dense = requests_at_once(
        layout, blocks, plan.prompt_tokens, total_tokens, plan.block_size
    )
    return replace(plan, kv_memory_bytes=memory, dense_requests=fit_dense, pruned_requests=fit)


def requests_at_once(
    layout: CacheLayout, pool_blocks: int, prompt_tokens: int, total_tokens: int, block_size: int
) -> tuple[int, int]:
    """How many requests of one size fit into a pool of blocks.

    Args:
        layout: cache layout of the requests.
        pool_blocks: number of blocks in the pool.
        prompt_tokens: length of each prompt, in tokens.
        total_tokens: length of each prompt and its answer, in tokens.
        block_size: tokens in a KV block.

    Returns:
        Number of pruned requests, one of them in the step that prunes, and of dense ones.
    """
    blocks = count_blocks(layout, prompt_tokens, total_tokens, block_size)
    most = max(blocks.peak, blocks.pruned)
    pruned = 1 + (pool_blocks - most) // blocks.pruned if pool_blocks >= most else 0
    return pruned, max(0, pool_blocks // blocks.dense)


def readable_bytes(count: float) -> str:
    """With three digits, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
