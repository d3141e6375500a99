"""One paragraph in vLLM's log, when the KV cache has been sized: what is served, and what it holds.

It comes from the worker: the first place that knows the configuration and the number of blocks.
"""

import hashlib
from typing import Any

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.plan import printable, readable_bytes, requests_at_once
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.environment import uses_rust_front_end

TYPICAL = 3072  # prompt tokens: a picture for LLaVA-NeXT, and a question


def describe_serving(
    vllm_config: Any,
    serving: Serving,
    num_blocks: int,
    block_size: int,
    layer_block_bytes: int,
) -> str:
    """The paragraph.

    Args:
        vllm_config: configuration of the engine.
        serving: settings and layout of the server.
        num_blocks: blocks of the KV cache, vLLM's empty one among them.
        block_size: tokens in a block of the layers to prune; vLLM may give other layers another.
        layer_block_bytes: bytes of a block in one layer of one rank.
    """
    settings, layout = serving.settings, serving.layout
    longest = vllm_config.model_config.max_model_len
    block_bytes = layer_block_bytes * len(layout.capacities) * layout.tensor_parallel
    sentences = [
        f"SPARSEMM: method {settings.method}{' (redistributed)' if settings.redistribute else ''}, "
        f"{describe_profile(settings)}, budget {settings.budget:,} tokens per KV head, window "
        f"{settings.window}."
    ]
    for n in sorted({min(TYPICAL, longest), longest}):
        held, dense = layout.held_blocks(n, n, block_size), -(-n // block_size)
        fit, fit_dense = requests_at_once(layout, num_blocks - 1, n, n, block_size)
        sentences.append(
            f"A prompt of {n:,} tokens{' (max_model_len)' if n == longest else ''} holds "
            f"{readable_bytes(held * block_bytes)} in {held:,} KV blocks after its prefill, dense "
            f"{readable_bytes(dense * block_bytes)} in {dense:,}; of {num_blocks - 1:,} blocks, "
            f"{fit:,} such prompts fit at once, dense {fit_dense:,}."
        )
    return " ".join(sentences + notes(vllm_config, settings, layout))


def describe_profile(settings: Settings) -> str:
    """Whose scores they are, what tells them from others, and what they rest on."""
    profile = settings.profile
    if not isinstance(profile, HeadProfile):
        return "no head profile (every head has the same budget)"
    digest = hashlib.sha256(profile.model_dump_json().encode()).hexdigest()[:12]
    samples = "samples unknown" if profile.samples is None else f"{profile.samples:,} samples"
    return f"head profile of {printable(profile.model_id)} (sha256 {digest}, {samples})"


def notes(vllm_config: Any, settings: Settings, layout: CacheLayout) -> list[str]:
    """What is off, or not as usual, and why."""
    total = vllm_config.model_config.get_total_num_hidden_layers()
    dense = total - len(layout.capacities)
    found = [
        (not layout.rules.prunes, f"Nothing is pruned: method {settings.method}."),
        (dense > 0, f"{dense} of {total} layers stay dense: they see a window or a chunk."),
        (
            settings.min_prompt_tokens > 0,
            f"Prompts of less than {settings.min_prompt_tokens:,} tokens stay dense: "
            "min_prompt_tokens.",
        ),
        (
            settings.prune_when_free_below is not None,
            "Prompts that leave so much of the pool free stay dense: prune_when_free_below "
            f"{settings.prune_when_free_below}.",
        ),
        (
            vllm_config.cache_config.enable_prefix_caching and layout.rules.prunes,
            "Prefix caching is off for answers to pruned prompts: they were computed from what "
            "was kept.",
        ),
        (
            vllm_config.model_config.enforce_eager,
            "CUDA graphs are off: --enforce-eager.",
        ),
        (
            bool(settings.mask_heads),
            f"{len(settings.mask_heads)} query heads are off: mask_heads.",
        ),
        (settings.record_kept is not None, "Every step waits for the device: record_kept."),
        (
            uses_rust_front_end(),
            "Requests are checked in the engine only, because of VLLM_USE_RUST_FRONTEND: a wrong "
            "'sparsemm' setting is logged and the server's own is used, where the Python front "
            "end answers HTTP 400. /metrics has no sparsemm: metrics, and there is no page.",
        ),
        (settings.poison_freed, "Every step is checked, and is slow: poison_freed."),
    ]
    return [note for applies, note in found if applies]
