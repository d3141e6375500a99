"""What a budget costs and saves: KV memory of one request, and how many requests fit."""

import math
from dataclasses import dataclass, replace

import numpy as np

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.settings import Settings

GB = 10**9
HEAD_SIZE = 128
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}


class PlanError(ValueError):
    """A plan for sizes that cannot be."""


@dataclass(frozen=True)
class Plan:
    """KV cache of one request, dense and pruned, over all layers and ranks.

    Attributes:
        model_id: of the profile.
        method, redistribute, budget, window, rho: as asked.
        prompt_tokens, answer_tokens, block_size, head_size: as asked.
        dtype: of the cache.
        pruned: whether the prompt is longer than what the budget covers.
        kept_min, kept_median, kept_mean, kept_max: prompt tokens per KV head, window included.
        block_bytes: of one block, all layers.
        dense_blocks: held by a request that keeps everything.
        peak_blocks: held in the step that prunes, when both copies exist.
        pruned_blocks: held after it.
        dense_bytes, peak_bytes, pruned_bytes: of these blocks.
        dense_ideal_bytes, ideal_bytes: of a dense and a pruned request's tokens, not rounded to
            pages and blocks.
        kv_memory_bytes: of the whole cache, if given.
        dense_requests: that fit into it at once.
        pruned_requests: that fit at once, one of them in the step that prunes.
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


def build_layout(
    profile: HeadProfile,
    budget: int,
    window: int = 32,
    rho: float = 0.1,
    method: str = "sparsemm",
    redistribute: bool = False,
) -> CacheLayout:
    """The cache layout that a server with these settings would have.

    Raises:
        SettingsError: for a value that a server would refuse.
    """
    values = {
        "budget": budget,
        "window": window,
        "rho": rho,
        "method": method,
        "redistribute": redistribute,
    }
    settings = Settings.from_additional_config({"sparsemm": values})
    return CacheLayout.from_scores(
        profile.tensor(),
        profile.num_kv_heads,
        settings.budget,
        settings.window,
        settings.rho,
        settings.method,
        redistribute=settings.redistribute,
    )


def tokens_per_head(layout: CacheLayout, prompt_tokens: int) -> np.ndarray:
    """Prompt tokens that each KV head keeps, the window included: int64 ``[L, Hkv]``.

    Of AdaKV the mean of each layer: a head's own number depends on the prompt.
    """
    if not layout.is_pruned(prompt_tokens):
        return np.full(np.shape(layout.capacities), prompt_tokens)
    return layout.kept_tokens(prompt_tokens) + layout.window


def make_plan(
    profile: HeadProfile,
    budget: int,
    prompt_tokens: int,
    *,
    answer_tokens: int = 0,
    kv_memory: float | None = None,
    block_size: int = 16,
    head_size: int = HEAD_SIZE,
    dtype: str = "bfloat16",
    window: int = 32,
    rho: float = 0.1,
    method: str = "sparsemm",
    redistribute: bool = False,
) -> Plan:
    """Count blocks and bytes with the functions that the scheduler counts with.

    Args:
        profile: scores of the model's heads; all layers count as full attention.
        budget: tokens per KV head on average, window included.
        prompt_tokens: `n`.
        answer_tokens: generated so far; every head keeps them all.
        kv_memory: of the whole cache over all ranks, in GB of 10^9 bytes.
        block_size: tokens in a KV block.
        head_size: `D`.
        dtype: of the cache, one of `DTYPE_BYTES`.
        window: observation window, in tokens.
        rho: share of the budget that is spread evenly.
        method: how the budget is divided among heads, one of `METHODS`.
        redistribute: give what heads cannot use of a short prompt to the others.

    Raises:
        PlanError: for a size that is not positive, or an unknown dtype.
        SettingsError: for a setting that a server would refuse.
    """
    check_sizes(prompt_tokens=prompt_tokens, block_size=block_size, head_size=head_size)
    check_sizes(0, answer_tokens=answer_tokens)
    if kv_memory is not None and not (math.isfinite(kv_memory) and kv_memory > 0):
        raise PlanError(f"--kv-memory is {kv_memory:g} GB; it must be larger than 0")
    if dtype not in DTYPE_BYTES:
        raise PlanError(f"--dtype is {dtype!a}; known are {', '.join(DTYPE_BYTES)}")
    layout = build_layout(profile, budget, window, rho, method, redistribute)
    kept = tokens_per_head(layout, prompt_tokens)
    total_tokens = prompt_tokens + answer_tokens
    token_bytes = 2 * head_size * DTYPE_BYTES[dtype]  # of one head: a key and a value
    block_bytes = kept.size * block_size * token_bytes

    dense = -(-total_tokens // block_size)
    prompt_blocks = -(-prompt_tokens // block_size)
    peak = prompt_blocks + layout.compact_blocks(prompt_tokens, block_size)
    after = layout.held_blocks(prompt_tokens, total_tokens, block_size)
    plan = Plan(
        model_id=profile.model_id,
        method=method,
        redistribute=redistribute,
        budget=budget,
        window=window,
        rho=rho,
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
        dense_blocks=dense,
        peak_blocks=peak,
        pruned_blocks=after,
        dense_bytes=dense * block_bytes,
        peak_bytes=peak * block_bytes,
        pruned_bytes=after * block_bytes,
        dense_ideal_bytes=kept.size * total_tokens * token_bytes,
        ideal_bytes=(int(kept.sum()) + kept.size * answer_tokens) * token_bytes,
    )
    if kv_memory is None:
        return plan
    memory = round(kv_memory * GB)
    blocks = memory // block_bytes - 1  # vLLM keeps one block that holds nothing
    fit, fit_dense = requests_at_once(layout, blocks, prompt_tokens, total_tokens, block_size)
    return replace(plan, kv_memory_bytes=memory, dense_requests=fit_dense, pruned_requests=fit)


def requests_at_once(
    layout: CacheLayout, blocks: int, prompt_tokens: int, total_tokens: int, block_size: int
) -> tuple[int, int]:
    """How many requests of that size fit into so many blocks.

    Returns:
        Pruned ones, one of them in the step that prunes, and dense ones.
    """
    peak = -(-prompt_tokens // block_size) + layout.compact_blocks(prompt_tokens, block_size)
    after = layout.held_blocks(prompt_tokens, total_tokens, block_size)
    most = max(peak, after)
    pruned = 1 + (blocks - most) // after if blocks >= most else 0
    return pruned, max(0, blocks // -(-total_tokens // block_size))


def readable_bytes(count: float) -> str:
    """With three digits, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
