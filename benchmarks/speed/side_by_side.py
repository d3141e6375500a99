"""Servers' cells beside each other, in plain text."""

from typing import Any

from common import aligned

from speed.variants import DENSE

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
# What was asked: these say nothing about any server.
ASKED = ("requests", "prompt_tokens_mean", "output_tokens", "second_turn_prompt_tokens_mean")


def beside(title: str, cells: dict[str, dict[str, Any]]) -> list[str]:
    """A title and a line for each number that any has, with its ratio to each of the dense ones.

    fp8 caches are what a user would switch on instead of pruning: what counts is the ratio to the
    better of the dense servers.

    Args:
        title: text above the columns.
        cells: cells of the same load by the server's variant.
    """
    columns: list[tuple[str, str | None]] = []  # a variant, and the one that it is divided by
    for name in cells:
        columns.append((name, None))
        if name not in DENSE:
            columns += [(name, dense) for dense in DENSE if dense in cells]
    lines = [["", *(f"/ {dense}" if dense else name for name, dense in columns)]]
    for label, key in ROWS.items():
        numbers = {name: cell.get(key) for name, cell in cells.items()}
        if set(numbers.values()) == {None}:
            continue
        lines.append([label, *(_shown(numbers, key, *column) for column in columns)])
    return [title, *aligned(lines, str.ljust, str.rjust).splitlines()]


def _shown(numbers: dict[str, Any], key: str, name: str, dense: str | None) -> str:
    number = numbers[name]
    if dense is None:
        return "-" if number is None else f"{number:,.5g}"
    if key in ASKED or number is None or not numbers[dense]:
        return ""
    return f"{number / numbers[dense]:.2f}"
