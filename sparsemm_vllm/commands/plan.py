"""A plan of KV memory as a table in the terminal."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.budget.plan import Plan, printable, readable_bytes


def print_plan(plan: Plan, console: Console, assumed_head_size: bool = False) -> None:
    """Print a plan as a table, with a sentence on what it rests on."""
    title = Text("KV cache of one request to ", style="bold")
    title.append(printable(plan.model_id))
    console.print(title)
    console.print(_what_was_asked(plan, assumed_head_size), style="dim", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "dense", "pruned", " "):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for style, row in _rows(plan):
        table.add_row(*row, style=style)
    console.print(table)
    for warning in _warnings(plan):
        console.print(f"[yellow]{warning}[/]")


def _what_was_asked(plan: Plan, assumed_head_size: bool) -> str:
    answer = f" and {plan.answer_tokens:,} of the answer" if plan.answer_tokens else ""
    assumed = " (assumed: --head-size)" if assumed_head_size else ""
    return (
        f"{plan.prompt_tokens:,} tokens of prompt{answer}; {plan.method}, budget {plan.budget:,}, "
        f"window {plan.window}, rho {plan.rho:g}{', redistributed' if plan.redistribute else ''}; "
        f"{plan.dtype}, head size {plan.head_size}{assumed}"
    )


def _rows(plan: Plan) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The table's rows, each with its style."""
    kept, mean = plan.prompt_tokens, plan.kept_mean
    yield "", ("prompt tokens per KV head", f"{kept:,}", f"{mean:,.1f}", _less(kept, mean))
    spread = f"{plan.kept_min:,}, {plan.kept_median:,g}, {plan.kept_max:,}"
    yield "", ("  smallest, median, largest", "", spread)
    dense, pruned = plan.dense_blocks, plan.pruned_blocks
    name = f"blocks of {plan.block_size} tokens"
    yield "", (name, f"{dense:,}", f"{pruned:,}", _less(dense, pruned))
    yield "bold", _bytes_row("KV memory", plan.dense_bytes, plan.pruned_bytes)
    ideal = "  ideal: not rounded to pages"
    yield "", _bytes_row(ideal, plan.dense_ideal_bytes, plan.ideal_bytes)
    adds_to_dense = f"{plan.dense_bytes / plan.dense_ideal_bytes - 1:.0%}"
    yield "", ("  rounding adds", adds_to_dense, f"{plan.pruned_bytes / plan.ideal_bytes - 1:.0%}")
    yield "", ("  in the step that prunes", "", readable_bytes(plan.peak_bytes))
    if plan.kv_memory_bytes is not None:
        yield "bold", _requests_row(plan, plan.kv_memory_bytes)


def _less(dense: float, pruned: float) -> str:
    return f"{dense / pruned:.3g} x less"


def _bytes_row(name: str, dense: int, pruned: int) -> tuple[str, ...]:
    return name, readable_bytes(dense), readable_bytes(pruned), _less(dense, pruned)


def _requests_row(plan: Plan, memory: int) -> tuple[str, ...]:
    assert plan.dense_requests is not None
    assert plan.pruned_requests is not None
    more = plan.pruned_requests / plan.dense_requests if plan.dense_requests else 0
    return (
        f"requests at once in {readable_bytes(memory)}",
        f"{plan.dense_requests:,}",
        f"{plan.pruned_requests:,}",
        f"{more:.3g} x more" if more else "",
    )


def _warnings(plan: Plan) -> Iterator[str]:
    if not plan.pruned:
        why = "The budget covers the prompt" if METHODS[plan.method].prunes else "Method full"
        yield f"{why}: nothing is pruned."
    if plan.kv_memory_bytes is not None and not plan.pruned_requests:
        yield "The cache is too small for one such request."
