"""The demo's picture: what was sent, and what a few heads kept of it."""

from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_vllm.commands.figures import ACCENT, FADED, picture_axes, save_figure, styled
from sparsemm_vllm.commands.kept_map import Head, KeptPicture, draw_kept, show_pixels

PANELS = 5  # heads that are shown
LINES = {"Question": "question", "True text": "true_text", "Answer": "answer"}


def draw_report(report: dict[str, Any], picture: KeptPicture, path: Path) -> None:
    """Save a picture and, for heads from the largest budget to the smallest, its kept patches.

    Args:
        report: report of the demo, as it is written.
        picture: picture that was sent, and what was kept of it.
        path: file for the PNG.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    from matplotlib.figure import Figure  # takes longer than all that comes before the server

    with styled():
        figure = Figure(figsize=(9.6, 8.2))
        first, *panels = figure.subplots(2, 3).flat
        show_pixels(first, np.asarray(picture.image.convert("RGB")))
        tokens = f"{len(picture.positions)} of the prompt's {picture.prompt_tokens} tokens"
        picture_axes(first, "the picture", tokens)
        heads = _choose_heads(picture)
        for axes, head in zip(panels, heads, strict=False):
            draw_kept(axes, picture, head)
        for axes in panels[len(heads) :]:
            axes.axis("off")
        _headline(figure, report)
        figure.subplots_adjust(
            left=0.02, right=0.98, top=0.81, bottom=0.035, wspace=0.07, hspace=0.17
        )
        save_figure(figure, path)


def _choose_heads(picture: KeptPicture) -> list[Head]:
    """Heads from the largest budget to the smallest, evenly spaced in rank."""
    ranked = sorted(picture.by_head, key=picture.tokens_of, reverse=True)
    ranks = np.linspace(0, len(ranked) - 1, min(PANELS, len(ranked))).round().astype(int)
    return [ranked[rank] for rank in ranks]


def _headline(figure: Any, report: dict[str, Any]) -> None:
    blocks = report["kv_blocks"]
    figure.suptitle(
        f"{blocks['after_pruning']} KV blocks instead of {blocks['dense']}, "
        f"{report['words_right']} of {report['words']} words right",
        x=0.02, y=0.975, ha="left",
    )  # fmt: skip
    for i, (name, key) in enumerate(LINES.items()):
        y, colour = 0.925 - 0.027 * i, {"color": ACCENT} if key == "answer" else {}
        figure.text(0.02, y, name, fontsize=10, color=FADED, va="top")
        figure.text(0.105, y, report[key], fontsize=10, va="top", **colour)
