"""The README's table of what GPUs measured, in Markdown."""

import os
from pathlib import Path

from speed.variants import DENSE, FOUR

from gpu_report.archive import newest
from gpu_report.rows import Parts, decodes, dense_us, failures, pairs, times_faster
from gpu_report.summary import NAME, commit_of, number, table

PRUNED = tuple(name for name in FOUR if name not in DENSE)
SERVED = "LBHNC"  # layout of the cache that SPARSEMM is served with
NOTHING = (
    "Nothing has been measured on a GPU yet: `benchmarks/gpu_suite.py` is made to do it "
    "([speed](docs/speed.md))."
)


def readme_table(root: Path, readme: Path) -> list[str]:
    """Lines of the README's table: each GPU's newest day, or that there is none.

    Args:
        root: folder of all results.
        readme: file that the lines are for; links are relative to it.
    """
    lines = []
    for folder, parts in newest(root).items():
        link = Path(os.path.relpath(folder / NAME, readme.parent)).as_posix()
        lines += _gpu_rows(parts, link, folder.name)
    return lines or [NOTHING]


def _gpu_rows(parts: Parts, link: str, day: str) -> list[str]:
    rows = [*_compared_steps(parts), *_compared_layers(parts)]
    facts = _facts(parts, link, day)
    if not rows:
        return [f"{facts} Nothing in it can be compared with dense.", ""]
    head = ("", *FOUR, *(f"{name}, times faster" for name in PRUNED))
    return [*table(head, rows), f"Times faster than the faster of the two dense ones. {facts}", ""]


def _compared_steps(parts: Parts) -> list[tuple[str, ...]]:
    """A row of the README for whole models."""
    found = pairs(parts)
    if not found:
        return []

    def asked(key: str, form: str) -> str:
        values = dict.fromkeys(r[key] for r in found.values() if r.get(key))
        texts = (f"{x:,}" if isinstance(x, int) else x for x in values)
        return form.format(" or ".join(texts)) if values else ""

    name = "whole decode step" + asked("of_model", ", {}") + asked("requests", ", {} requests")
    name += asked("prompt_tokens", " of {} tokens") + asked("budget", ", B = {}")
    times = {variant: each["step_ms"] for variant, each in found.items()}
    return [_readme_row(name, times, 2, " ms")]


def _compared_layers(parts: Parts) -> list[tuple[str, ...]]:
    """Rows of the README for attention: what FlashAttention was measured beside.

    SPARSEMM's times are those of the layout that it serves, the dense ones of the faster layout.
    """
    rows, lines = decodes(parts), []
    sizes = {(row.size, row.budget) for row in rows if row.budget is not None}
    for size, budget in sorted(sizes):
        dense = dense_us(rows, size)
        if not dense:  # it does not fit, or was not measured: the summary has the rest
            continue
        own = [row for row in rows if (row.size, row.budget) == (size, budget)]
        pruned = {row.variant: row.us for row in own if row.layout in ("", SERVED)}
        model, n, batch = size
        name = f"attention of a layer, {model}, {batch} x {n:,} tokens, B = {budget}"
        lines.append(_readme_row(name, dense | pruned, 1, " us"))
    return lines


def _facts(parts: Parts, link: str, day: str) -> str:
    """What measured it, and what a reader must know of it."""
    machines = [machine for record in parts.values() for machine in record["machines"]]
    machine, commits = machines[-1], dict.fromkeys(map(commit_of, machines))
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "triton", "vllm") if machine.get(k))
    facts = f"{machine['device']}, driver {machine['driver']}, {versions}, commit "
    facts += f"{', '.join(commits)}, {day}: [all figures]({link})."
    if partial := [part for part, record in parts.items() if not record["complete"]]:
        facts += f" **Partial**: {', '.join(partial)}."
    if broken := [each for each in failures(parts) if not each["passed"]]:
        facts += f" **Cases that failed: {len(broken)}.**"
    if differing := [row.label for row in decodes(parts) if row.differs]:
        facts += f" FlashAttention's output is another in: {', '.join(differing)}."
    return facts


def _readme_row(name: str, times: dict[str, float], digits: int, unit: str) -> tuple[str, ...]:
    dense = [times.get(other) for other in DENSE]
    ratios = (times_faster(times[own], dense) if own in times else None for own in PRUNED)
    figures = (number(times.get(variant), digits, unit) for variant in FOUR)
    return name, *figures, *(number(ratio, 2) for ratio in ratios)
