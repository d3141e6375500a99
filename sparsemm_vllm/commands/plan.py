"""A plan of KV memory as a table in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.budget.plan import Plan, printable, readable_bytes


def _less(dense: float, pruned: float) -> str:
    return f"{dense / pruned:.3g} x less"


def print_plan(plan: Plan, console: Console, assumed_head_size: bool = False) -> None:
    """Print a plan as a table, with a sentence on what it rests on."""
    title = Text("KV cache of one request to ", style="bold")
    title.append(printable(plan.model_id))
    console.print(title)
    answer = f" and {plan.answer_tokens:,} of the answer" if plan.answer_tokens else ""
    assumed = " (assumed: --head-size)" if assumed_head_size else ""
    console.print(
        f"{plan.prompt_tokens:,} tokens of prompt{answer}; {plan.method}, budget {plan.budget:,}, "
        f"window {plan.window}, rho {plan.rho:g}{', redistributed' if plan.redistribute else ''}; "
        f"{plan.dtype}, head size {plan.head_size}{assumed}",
        style="dim",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "dense", "pruned", " "):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_row(
        "prompt tokens per KV head",
        f"{plan.prompt_tokens:,}",
        f"{plan.kept_mean:,.1f}",
        _less(plan.prompt_tokens, plan.kept_mean),
    )
    table.add_row("  smallest, median, largest", "", _spread(plan))
    table.add_row(
        f"blocks of {plan.block_size} tokens",
        f"{plan.dense_blocks:,}",
        f"{plan.pruned_blocks:,}",
        _less(plan.dense_blocks, plan.pruned_blocks),
    )
    table.add_row(
        "KV memory",
        readable_bytes(plan.dense_bytes),
        readable_bytes(plan.pruned_bytes),
        _less(plan.dense_bytes, plan.pruned_bytes),
        style="bold",
    )
    table.add_row(
        "  ideal: not rounded to pages",
        readable_bytes(plan.dense_ideal_bytes),
        readable_bytes(plan.ideal_bytes),
        _less(plan.dense_ideal_bytes, plan.ideal_bytes),
    )
    table.add_row(
        "  rounding adds",
        f"{plan.dense_bytes / plan.dense_ideal_bytes - 1:.0%}",
        f"{plan.pruned_bytes / plan.ideal_bytes - 1:.0%}",
    )
    table.add_row("  in the step that prunes", "", readable_bytes(plan.peak_bytes))
    if plan.kv_memory_bytes is not None:
        assert plan.dense_requests is not None
        assert plan.pruned_requests is not None
        more = plan.pruned_requests / plan.dense_requests if plan.dense_requests else 0
        table.add_row(
            f"requests at once in {readable_bytes(plan.kv_memory_bytes)}",
            f"{plan.dense_requests:,}",
            f"{plan.pruned_requests:,}",
            f"{more:.3g} x more" if more else "",
            style="bold",
        )
    console.print(table)
    if not plan.pruned:
        why = "The budget covers the prompt" if METHODS[plan.method].prunes else "Method full"
        console.print(f"[yellow]{why}: nothing is pruned.[/]")
    if plan.kv_memory_bytes is not None and not plan.pruned_requests:
        console.print("[yellow]The cache is too small for one such request.[/]")


def _spread(plan: Plan) -> str:
    return f"{plan.kept_min:,}, {plan.kept_median:,g}, {plan.kept_max:,}"
