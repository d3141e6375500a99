"""An evaluation as a picture: accuracy against the KV cache that is really held.

Matplotlib is imported in functions: it takes longer than all that other commands do first.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm_vllm.budget.plan import printable, readable_bytes
from sparsemm_vllm.commands.evaluate.records import KEPT_SHARE, Record, curves, dense_record
from sparsemm_vllm.commands.evaluate.report import tasks_of
from sparsemm_vllm.commands.figures import ACCENT, FADED, FRAME, INK, plot_axes, save_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour, line and marker; SparseMM's stand out. Colours of Okabe and Ito, told apart by most.
LOOKS = {
    "sparsemm": (ACCENT, "-", "o"),
    "sparsemm+redistribute": ("#e69f00", "-", "s"),
    "snapkv": ("#0072b2", "-", "^"),
    "pyramidkv": ("#009e73", "-", "v"),
    "adakv": ("#cc79a7", "-", "D"),
    "random_heads": ("#56b4e9", "--", "P"),
    "random_heads+redistribute": ("#56b4e9", ":", "X"),
    "random": ("#999999", "--", "X"),
}
TASK_TITLES = {"ocr": "Read all the text", "qa": "Answer about one line"}
MASK_COLOURS = {"visual": ACCENT, "random": "#9aa1ab"}
WIDTH = 5.6  # inches a task
LETTERS = 7.5  # of the title, in an inch


def draw_records(records: Sequence[Record], model: str, path: Path) -> None:
    """Save the picture as PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    with styled():
        save_figure(records_figure(records, model), path)


def records_figure(records: Sequence[Record], model: str) -> "Figure":
    """A column a task: its curves, and below them what silenced heads cost, if both are there."""
    from matplotlib.figure import Figure

    tasks = tasks_of(records)
    rows = []
    if any(curves(records, task) for task in tasks):
        rows.append((_curves_panel, 5.0))
    if any(record.mask for record in records):
        rows.append((_masks_panel, 0.75 + 0.35 * len({r.mask for r in records})))
    heights = [height for _, height in rows]
    width = max(WIDTH * len(tasks), 8)
    figure = Figure(figsize=(width, sum(heights) + 1.6), layout="constrained")
    panels = figure.subplots(len(rows), len(tasks), squeeze=False, height_ratios=heights)
    for (draw, _), line in zip(rows, panels, strict=True):
        for index, (axes, task) in enumerate(zip(line, tasks, strict=True)):
            draw(axes, records, task, first=index == 0)
    _headline(figure, records, model)
    return figure


def _headline(figure: Any, records: Sequence[Record], model: str) -> None:
    from matplotlib.lines import Line2D

    dense = dense_record(records, records[0].task)
    title = f"{printable(model)}: accuracy against the KV cache that a prompt holds"
    wide = int(LETTERS * figure.get_figwidth())
    figure.suptitle(textwrap.fill(title, wide), x=0.01, ha="left")
    names = list(dict.fromkeys(r.curve for r in records if r.budget is not None))
    handles = []
    for name in names:
        colour, line, marker = LOOKS[name]
        handles.append(Line2D([], [], color=colour, linestyle=line, marker=marker, label=name))
    note = (
        f"{dense.pictures} held-out pictures a point; bands and bars: 95 % intervals "
        "(bootstrap over pictures)"
    )
    figure.legend(
        handles=handles, title=note, loc="outside lower left", frameon=False, alignment="left",
        ncols=max(1, min(4, len(names))), title_fontproperties={"size": 9.5},
    )  # fmt: skip


def _curves_panel(axes: Any, records: Sequence[Record], task: str, first: bool) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

    dense = dense_record(records, task)
    found = curves(records, task)
    for name, curve in found.items():
        colour, line, marker = LOOKS[name]
        held = [record.held_bytes for record in curve]
        accuracy = [record.exact_words for record in curve]
        axes.fill_between(
            held, [a.low for a in accuracy], [a.high for a in accuracy],
            color=colour, alpha=0.1, linewidth=0,
        )  # fmt: skip
        axes.plot(
            held, [a.value for a in accuracy], line, color=colour, marker=marker, markersize=5.5,
            linewidth=1.8, zorder=4 if name.startswith("sparsemm") else 3,
        )  # fmt: skip
    value = dense.exact_words.value
    axes.axhline(KEPT_SHARE * value, color=FADED, linewidth=1, linestyle=(0, (2, 3)))
    axes.annotate(
        f"{KEPT_SHARE:.0%} of dense", (0.01, KEPT_SHARE * value), (0, 3), color=FADED, fontsize=8.5,
        xycoords=("axes fraction", "data"), textcoords="offset points",
    )  # fmt: skip
    axes.plot(dense.held_bytes, value, "*", color=INK, markersize=12, zorder=5)
    axes.annotate(
        f"dense, {value:.1%}", (dense.held_bytes, value), (0, 9), ha="right", color=INK,
        textcoords="offset points", fontsize=9, fontweight="bold",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda held, _: readable_bytes(held))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(-0.02, min(1.08, value + 0.1))
    axes.set_xlabel("KV cache held by a prompt, in whole blocks, log scale")
    if first:
        axes.set_ylabel("words exactly right")
    axes.set_title(TASK_TITLES.get(task, task), pad=8)
    plot_axes(axes)


def _masks_panel(axes: Any, records: Sequence[Record], task: str, first: bool) -> None:
    """Bars: words exactly right of the dense model, and with heads silenced."""
    from matplotlib.ticker import PercentFormatter

    shown = [dense_record(records, task)]
    shown += [record for record in records if record.task == task and record.mask is not None]
    for place, record in enumerate(shown):
        accuracy = record.exact_words
        colour = INK if record.mask is None else MASK_COLOURS[record.mask]
        axes.barh(place, accuracy.value, 0.62, color=colour)
        axes.plot([accuracy.low, accuracy.high], [place] * 2, color=FRAME, linewidth=2)
        axes.annotate(
            f"{accuracy.value:.1%}", (accuracy.high, place), (5, 0), va="center", fontsize=9,
            textcoords="offset points", color=INK,
        )  # fmt: skip
    labels = [
        (record.mask or "dense") + (f", {record.engines} draws" if record.engines > 1 else "")
        for record in shown
    ]
    axes.set_yticks(range(len(shown)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("words exactly right")
    axes.set_title(f"{shown[-1].masked_heads} query heads silenced, nothing pruned", pad=8)
    plot_axes(axes)
