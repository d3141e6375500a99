"""Two servers' cells beside each other, in plain text."""

from __future__ import annotations

from typing import Any

ROWS = {
    "requests": "requests",
    "prompt tokens, mean": "prompt_tokens_mean",
    "output tokens of each": "output_tokens",
    "requests/s": "requests_per_second",
    "output tokens/s": "output_tokens_per_second",
    "time to first token, p50, ms": "ttft_p50_ms",
    "time to first token, p99, ms": "ttft_p99_ms",
    "time per output token, p50, ms": "tpot_p50_ms",
    "time per output token, p99, ms": "tpot_p99_ms",
    "running requests, peak": "running_requests_peak",
    "running requests, mean": "running_requests_mean",
    "KV blocks": "kv_blocks",
    "KV blocks in use, peak share": "kv_usage_peak_share",
    "KV blocks in use, mean share": "kv_usage_mean_share",
    "preemptions": "preemptions",
    "prompt tokens from the prefix cache": "prefix_hit_tokens",
    "new picture, first token, ms": "cold_ttft_p50_ms",
    "asked again, first token, ms": "again_ttft_p50_ms",
    "asked again, cached tokens": "again_cached_tokens_mean",
    "second turn, first token, ms": "second_turn_ttft_p50_ms",
    "second turn, prompt tokens": "second_turn_prompt_tokens_mean",
    "second turn, cached tokens": "second_turn_cached_tokens_mean",
}
# What was asked: these say nothing about either.
ASKED = ("requests", "prompt_tokens_mean", "output_tokens", "second_turn_prompt_tokens_mean")
LABEL, NUMBER = 36, 11  # characters


def beside(title: str, dense: dict[str, Any] | None, sparsemm: dict[str, Any] | None) -> list[str]:
    """A title and a line for each number that either has, with SPARSEMM's over dense's.

    Args:
        title: above the columns.
        dense: a cell, or None.
        sparsemm: the other server's of the same load.
    """
    lines = [title, f"{'':{LABEL}}{'dense':>{NUMBER}}{'sparsemm':>{NUMBER}}    ratio"]
    for label, key in ROWS.items():
        numbers = [(cell or {}).get(key) for cell in (dense, sparsemm)]
        if numbers == [None, None]:
            continue
        shown = "".join(f"{'-' if n is None else f'{n:,.5g}':>{NUMBER}}" for n in numbers)
        both = None not in numbers and numbers[0] != 0 and key not in ASKED
        ratio = f"{numbers[1] / numbers[0]:9.2f}" if both else ""
        lines.append(f"{label:{LABEL}}{shown}{ratio}")
    return lines
