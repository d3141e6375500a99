"""Pictures of a GPU run: time against bytes, prediction beside measurement, whole decode steps."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gpu_report.rows import Decode, Parts, decodes, pairs, rates
from sparsemm_vllm.commands.figures import INK, plot_axes, save_figure, styled

COLOURS = {
    "dense": "#333333",
    "dense-fp8": "#999999",
    "sparsemm": "#0072b2",
    "sparsemm-fp8": "#56b4e9",
    "snapkv": "#d55e00",
}
PREDICTED = "#d55e00"
MARKS = "osD^vP*X"


@styled()
def draw(parts: Parts, title: str, folder: Path) -> dict[str, Path]:
    """Draw what the records have figures for, in the style of all our pictures.

    Args:
        parts: records by part.
        title: device and day.
        folder: folder of the pictures.

    Returns:
        Files by the picture's name: ``bytes``, ``prediction``, ``steps``.
    """
    rows = decodes(parts)
    figures = {
        "bytes": draw_bytes(rows, rates(parts), title) if rows else None,
        "prediction": draw_prediction(rows, title) if rows else None,
        "steps": draw_steps(pairs(parts), title) if pairs(parts) else None,
    }
    files = {}
    for name, figure in figures.items():
        if figure is not None:
            files[name] = folder / f"{name}.png"
            save_figure(figure, files[name])
            plt.close(figure)
    return files


def draw_bytes(rows: list[Decode], speeds: dict[str, float], title: str) -> Figure:
    """Microseconds of a layer's attention against the bytes that it reads, a panel a model."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(
        1, len(models), figsize=(2.6 + 3.9 * len(models), 4.2), squeeze=False, layout="constrained"
    )
    batches = sorted({row.batch for row in rows})
    marks = dict(zip(batches, MARKS, strict=False))
    for panel, model in zip(axes[0], models, strict=True):
        own = [row for row in rows if row.model == model and row.bytes]
        for row in own:
            mark = {"marker": marks[row.batch], "linestyle": ""}
            panel.plot(row.bytes / 1e6, row.us, **mark, **_kernel_style(row))
            if row.flash_us is not None:
                panel.plot(row.bytes / 1e6, row.flash_us, **mark, **_flash_style(row))
        _draw_floor(panel, own, speeds)
        panel.set(title=model, xscale="log", yscale="log", xlabel="KV read in a layer, MB")
        _tidy(panel)
    axes[0][0].set_ylabel("us a layer")
    handles = _variant_handles(rows)
    handles += [_handle(f"batch {batch}", INK, marks[batch], face="#dddddd") for batch in batches]
    handles += [line for line in axes[0][0].get_lines() if line.get_linestyle() == ":"]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8.5)
    figure.suptitle(f"Attention of a decode step\n{title}", fontsize=11)
    return figure


def _draw_floor(panel: Axes, rows: list[Decode], speeds: dict[str, float]) -> None:
    name = next((n for n in ("read bandwidth", "copy bandwidth") if n in speeds), None)
    if name is None or not rows:
        return
    ends = [min(row.bytes for row in rows) / 2, max(row.bytes for row in rows) * 2]
    label = f"floor: {name},\n{speeds[name] / 1e9:,.0f} GB/s"
    times = [1e6 * end / speeds[name] for end in ends]
    megabytes = [end / 1e6 for end in ends]
    panel.plot(megabytes, times, color=INK, linestyle=":", linewidth=1.4, label=label)


def draw_prediction(rows: list[Decode], title: str) -> Figure:
    """Of each case the floor, the cost model's prediction, the measurement and FlashAttention."""
    rows = sorted(rows, key=lambda row: (row.model, row.n, row.batch, -row.us))[::-1]
    figure, panel = plt.subplots(figsize=(8.6, 1.7 + 0.27 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        style = _kernel_style(row)
        panel.plot(row.spread, (y, y), color=style["color"], linewidth=4, alpha=0.35, zorder=2)
        panel.plot(row.us, y, marker="o", **style)
        if row.floor_us is not None:
            panel.plot(row.floor_us, y, marker="|", markersize=11, color=INK, zorder=2)
        if row.model_us is not None:
            panel.plot(
                row.model_us, y, marker="D", markersize=9, color=PREDICTED,
                markerfacecolor="none", zorder=4,
            )  # fmt: skip
        if row.flash_us is not None:
            panel.plot(row.flash_us, y, marker="o", **_flash_style(row))
    panel.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8.5)
    panel.set(xscale="log", xlabel="us a layer", ylim=(-0.7, len(rows) - 0.3))
    _tidy(panel)
    handles = [*_variant_handles(rows), _handle("floor", INK, "|")]
    if any(row.model_us is not None for row in rows):
        handles.append(_handle("cost model", PREDICTED, "D", face="none"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.suptitle(
        f"Attention of a decode step, predicted and measured (20 to 80 %)\n{title}", fontsize=11
    )
    return figure


def draw_steps(found: dict[str, dict[str, Any]], title: str) -> Figure:
    """Milliseconds of a whole decode step, a bar for each variant."""
    figure, panel = plt.subplots(figsize=(7.2, 1.5 + 0.5 * len(found)), layout="constrained")
    names = list(found)[::-1]
    times = [found[name]["step_ms"] for name in names]
    bars = panel.barh(names, times, color=[COLOURS[name] for name in names], height=0.62)
    panel.bar_label(bars, [f"{time:,.2f} ms" for time in times], padding=4, fontsize=9)
    panel.set(xlabel="ms a decode step", xlim=(0, 1.18 * max(times)))
    plot_axes(panel)
    figure.suptitle(f"Whole decode step\n{title}", fontsize=11)
    return figure


def _kernel_style(row: Decode) -> dict[str, Any]:
    """Our kernel; a ring where it reads all tokens, since dense vLLM is FlashAttention."""
    face = "none" if row.budget is None else COLOURS[row.variant]
    ring = {"markersize": 11, "markeredgewidth": 1.6, "zorder": 3}
    return {"color": COLOURS[row.variant], "markerfacecolor": face} | (
        ring if row.budget is None else {"markersize": 7, "zorder": 4}
    )


def _flash_style(row: Decode) -> dict[str, Any]:
    return {"color": COLOURS[row.variant], "markersize": 6, "zorder": 4}


def _variant_handles(rows: list[Decode]) -> list[Line2D]:
    """What is filled, by variant, and the ring."""
    handles = []
    for name, colour in COLOURS.items():
        own = [row for row in rows if row.variant == name]
        if any(row.flash_us is not None for row in own):
            handles.append(_handle(f"{name} (FlashAttention)", colour, "o"))
        elif any(row.budget is not None for row in own):
            handles.append(_handle(name, colour, "o"))
    if any(row.budget is None for row in rows):
        handles.append(_handle("our kernel, all tokens", COLOURS["dense"], "o", face="none"))
    return handles


def _handle(label: str, colour: str, mark: str, face: str | None = None) -> Line2D:
    """An entry of a legend."""
    return Line2D(
        [], [], linestyle="", marker=mark, color=colour, label=label,
        markerfacecolor=face or colour, markersize=7,
        markeredgewidth=2 if mark == "|" else 1.4,
    )  # fmt: skip


def _tidy(panel: Axes) -> None:
    """Plain numbers on logarithmic axes."""
    for axis in (panel.xaxis, panel.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_minor_formatter(lambda *_: "")
    plot_axes(panel)
