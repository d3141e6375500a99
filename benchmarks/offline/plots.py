"""The curves and the heads as PNG, from the JSON files."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from sparsemm_vllm.commands.figures import plot_axes, styled
from sparsemm_vllm.files import write_whole

STYLES = {
    "sparsemm": ("SparseMM", "#c0392b", "-", "o"),
    "sparsemm+redistribute": ("SparseMM, redistributed", "#e67e22", "-", "s"),
    "causal": ("causal scores", "#2471a3", "-", "D"),
    "causal+redistribute": ("causal scores, redistributed", "#5dade2", "-", "v"),
    "snapkv": ("SnapKV", "#27ae60", "--", "^"),
    "adakv": ("AdaKV", "#8e44ad", "--", "P"),
    "pyramidkv": ("PyramidKV", "#b7950b", "--", "X"),
    "random": ("random tokens", "#7f8c8d", ":", "<"),
    "random_heads": ("random head scores", "#34495e", ":", ">"),
}
TITLES = {"read": "Read the text", "query": "What follows KEY?"}
DPI = 110


def _save(figure: Figure, path: Path) -> None:
    """With a palette: a third of the bytes."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    with Image.open(drawn) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    packed = BytesIO()
    small.save(packed, "png", optimize=True)
    write_whole(path, packed.getvalue())


@styled()
def plot_curves(document: dict[str, Any], path: Path) -> None:
    """Words exactly right against held KV bytes, a panel a task, bands of 95 %."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), sharey=True, layout="constrained")
    for axis, task in zip(axes, TITLES, strict=True):
        _task_curves(axis, [r for r in document["records"] if r["task"] == task])
        axis.set_title(TITLES[task])
    axes[0].set_ylabel("words exactly right (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        f"{document['model']}: accuracy against what the prompt's cache holds "
        f"({document['pictures']} held-out pictures a point, window {document['window']})"
    )
    _save(figure, path)


def _task_curves(axis: Axes, records: list[dict[str, Any]]) -> None:
    dense = next(r for r in records if r.get("method") == "full")
    target = 100 * 0.97 * dense["exact_words"]
    axis.axhline(target, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    axis.annotate(
        "97 % of dense", (0.01, target), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
    )
    for method, (label, colour, line, marker) in STYLES.items():
        points = [r for r in records if r.get("method") == method]
        if not points:
            continue
        held = [r["held_bytes"] / 1024 for r in points]
        axis.plot(
            held,
            [100 * r["exact_words"] for r in points],
            line,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.6,
            label=label,
        )
        low, high = np.array([r["exact_words_95"] for r in points]).T * 100
        axis.fill_between(held, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.plot(
        dense["held_bytes"] / 1024,
        100 * dense["exact_words"],
        "*",
        color="black",
        markersize=13,
        label="dense",
    )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("KV held of the prompt (KiB, float16)")
    axis.set_ylim(-2, 102)
    plot_axes(axis)


@styled()
def plot_heads(
    document: dict[str, Any], scores: np.ndarray, causal: np.ndarray, path: Path
) -> None:
    """Concentration of the scores, scores against knock-outs, and silenced heads.

    Args:
        document: results of the command `heads`.
        scores: visual scores of the KV heads, ``[L, Hkv]``.
        causal: causal scores of the KV heads, ``[L, Hkv]``.
        path: file of the PNG.
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    _concentration(axes[0], scores, causal)
    _knock_outs(axes[1], document, scores)
    _silenced(axes[2], document)
    figure.suptitle(f"{document['model']}: what single heads are worth")
    _save(figure, path)


def _concentration(axis: Axes, scores: np.ndarray, causal: np.ndarray) -> None:
    curves = {"visual scores": scores, "causal scores": causal}
    for (label, values), colour in zip(curves.items(), ("#c0392b", "#2471a3"), strict=True):
        ranked = np.sort(values.flatten())[::-1]
        share = np.concatenate([[0], ranked.cumsum() / ranked.sum()])
        axis.plot(np.linspace(0, 100, len(share)), 100 * share, color=colour, label=label)
    axis.plot([0, 100], [0, 100], ":", color="grey", label="even")
    axis.set(title="Concentration", xlabel="best KV heads (%)", ylabel="share of the score (%)")
    axis.legend(frameon=False, loc="lower right")
    plot_axes(axis)


def _knock_outs(axis: Axes, document: dict[str, Any], scores: np.ndarray) -> None:
    share = 100 * scores / scores.sum()
    for (task, title), colour in zip(TITLES.items(), ("#c0392b", "#2471a3"), strict=True):
        if task not in document:  # the command was interrupted behind the first
            continue
        found = document[task]["knock_outs"]
        correlation = found["visual_score_against_loss_rise"]
        axis.scatter(
            share,
            found["loss_rise"],
            s=22,
            color=colour,
            alpha=0.75,
            linewidth=0,
            label=f"{title} (Spearman {correlation:+.2f})",
        )
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.axhline(0, color="grey", linewidth=0.6)
    axis.set(
        title="One KV head keeps only its window",
        xlabel="share of the visual score (%)",
        ylabel="rise of the answer's loss (nats a token)",
    )
    axis.legend(frameon=False)
    plot_axes(axis)


def _silenced(axis: Axes, document: dict[str, Any]) -> None:
    kinds = {"dense": "#7f8c8d", "random": "#27ae60", "visual": "#c0392b"}
    measured = [task for task in TITLES if task in document]
    for place, task in enumerate(measured):
        found = document[task]["silenced"]
        for offset, (kind, colour) in zip((-0.27, 0, 0.27), kinds.items(), strict=True):
            bar = axis.bar(
                place + offset,
                100 * found[kind],
                0.25,
                color=colour,
                label=kind if place == 0 else None,
            )
            axis.bar_label(bar, fmt="%.1f", fontsize=8, padding=2)
        each = [100 * one for one in found["each_random"]]
        axis.plot([place] * len(each), each, "_", color="black", markersize=9)
    count = document[measured[0]]["silenced"]["heads"]
    axis.set_xticks(range(len(measured)), [TITLES[task] for task in measured])
    axis.set(title=f"{count} query heads (5 %) silenced", ylabel="words exactly right (%)")
    axis.set_ylim(0, 112)
    plot_axes(axis)
    axis.legend(frameon=False, ncols=3, loc="upper center", fontsize=8)
