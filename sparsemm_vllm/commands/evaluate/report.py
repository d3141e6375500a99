"""An evaluation as tables and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsemm_vllm.budget.plan import printable, readable_bytes
from sparsemm_vllm.commands.evaluate.records import (
    KEPT_SHARE,
    Estimate,
    Record,
    ablation,
    bytes_that_keep,
    curves,
    dense_record,
)
from sparsemm_vllm.files import write_whole


def save_json(path: Path, configuration: dict[str, Any], records: Sequence[Record]) -> None:
    """Write everything that the tables and pictures show."""
    document = configuration | {
        "statistics": "exact_words, character_errors and anls: mean with 95 % interval (bootstrap "
        "over pictures); change: paired difference from the dense cache",
        "keeps_97_percent_from_bytes": {
            task: {
                name: round(bytes_that_keep(curve, dense_record(records, task)))
                for name, curve in curves(records, task).items()
            }
            for task in tasks_of(records)
        },
        "records": [asdict(record) for record in records],
    }
    rounded = json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 6))
    write_whole(path, json.dumps(rounded, indent=1) + "\n")


def tasks_of(records: Sequence[Record]) -> list[str]:
    """Tasks, in order."""
    return list(dict.fromkeys(record.task for record in records))


def print_records(records: Sequence[Record], model: str, console: Console) -> None:
    """Print a table for each task, and what follows from it."""
    for task in tasks_of(records):
        dense = dense_record(records, task)
        title = Text(f"\n{task}  ", style="bold").append(
            f"{printable(model)}, {dense.pictures} pictures, "
            f"{dense.prompt_tokens:.0f} prompt tokens on average",
            style="not bold dim",
        )
        console.print(title)
        console.print(_table([r for r in records if r.task == task], dense))
        for line in _findings(records, task, dense):
            console.print(line, highlight=False)


def _table(records: Sequence[Record], dense: Record) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        "method",
        "budget",
        "KV held",
        "words exact %",
        "change",
        "char. errors %",
        "ANLS",
    ):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for record in records:
        draws = f", {record.engines} draws" if record.engines > 1 else ""
        masked = f" ({record.masked_heads}{draws})" if record.mask else ""
        share = f" {record.held_bytes / dense.held_bytes:4.0%}"
        is_dense = record == dense
        table.add_row(
            "dense" if is_dense else record.curve + masked,
            "" if record.budget is None else f"{record.budget:,}",
            readable_bytes(record.held_bytes) + share,
            f"{_percent(record.exact_words)} {_range(record.exact_words)}",
            "" if is_dense else _range(record.change["exact_words"], signed=True),
            _percent(record.character_errors),
            f"{record.anls.value:.3f}",
            style="bold" if is_dense else "",
        )
    return table


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f}"


def _range(estimate: Estimate, signed: bool = False) -> str:
    form = "{:+.1f}" if signed else "{:.1f}"
    return "..".join(form.format(100 * end) for end in (estimate.low, estimate.high))


def _findings(records: Sequence[Record], task: str, dense: Record) -> list[str]:
    """Sentences: where curves reach the dense accuracy, and what silenced heads cost."""
    lines = [
        f"{name} keeps {KEPT_SHARE:.0%} of the dense accuracy from "
        f"{readable_bytes(bytes_that_keep(curve, dense))} on"
        for name, curve in curves(records, task).items()
    ]
    drops = {mask: -change.value for mask, change in ablation(records, task).items()}
    if len(drops) == 2:
        line = "silenced heads cost {visual:.1f} points (visual) and {random:.1f} (random)".format(
            **{mask: 100 * drop for mask, drop in drops.items()}
        )
        ratio = f": {drops['visual'] / drops['random']:.1f} x" if drops["random"] > 0 else ""
        lines.append(line + ratio)
    return lines
