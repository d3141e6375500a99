"""A sight as a picture and in the terminal."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsemm_vllm.budget.plan import printable
from sparsemm_vllm.commands.figures import FADED, PictureError, picture_axes, save_figure, styled
from sparsemm_vllm.commands.kept_map import (
    Head,
    draw_kept,
    grey,
    patch_inside,
    show_pixels,
    token_map,
)
from sparsemm_vllm.commands.look.sight import Sight

# One for each word of an answer, in turn; told apart by people who do not see red and green too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
LOWEST = 0.835  # where the last line of an answer may stand, of the figure's height


def word_colour(index: int) -> str:
    """Colour of an answer's word."""
    return COLOURS[index % len(COLOURS)]


def check_picture(path: Path) -> None:
    """Refuse a file that cannot be written, before the work.

    Raises:
        PictureError: naming it.
    """
    if path.suffix.lower() != ".png":
        raise PictureError(f"{path} is not a .png file; name one")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise PictureError(f"{path}: its folder does not exist, or it is one")


def draw_sight(sight: Sight, path: Path) -> None:
    """Save a sight as a PNG.

    The picture with the patches that the visual heads looked at while the model said each word, in
    the word's colour; how many heads kept each patch; and what the first watched head and the
    head with the median budget kept.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure  # takes longer than all that comes before the engine

    with styled():
        figure = Figure(figsize=(9.4, 8.0))
        grid = figure.add_gridspec(
            3, 2, width_ratios=(3, 1), left=0.02, right=0.98, top=0.80, bottom=0.06,
            wspace=0.05, hspace=0.42,
        )  # fmt: skip
        _draw_looks(figure.add_subplot(grid[:, 0]), sight)
        _draw_share(figure.add_subplot(grid[0, 1]), sight)
        for row, (title, head) in enumerate(_examples(sight), 1):
            draw_kept(figure.add_subplot(grid[row, 1]), sight.kept, head, title)
        _write_answer(figure, sight)
        save_figure(figure, path)


def _examples(sight: Sight) -> list[tuple[str, Head]]:
    """The KV head of the best visual head, and one of median budget, where any was pruned."""
    if not sight.kept.pruned:
        return []
    layer, query_head = sight.heads[0]
    ranked = sorted(sight.kept.by_head, key=sight.kept.tokens_of)
    return [
        ("the best visual head", (layer, query_head // sight.group)),
        ("a head of median budget", ranked[len(ranked) // 2]),
    ]


def _draw_looks(axes: Any, sight: Sight) -> None:
    kept = sight.kept
    show_pixels(axes, grey(kept.image, 0.55))
    for index, word in enumerate(sight.words):
        _draw_word(axes, sight, word.looks, word_colour(index))
    heads = f"{len(sight.heads)} visual heads" if len(sight.heads) > 1 else "the best visual head"
    picture_axes(
        axes,
        "where it looked while it said each word",
        f"largest attention weights of {heads}\n{len(kept.positions)} of the prompt's "
        f"{kept.prompt_tokens} tokens are the picture's",
    )


def _draw_word(axes: Any, sight: Sight, looks: np.ndarray, colour: str) -> None:
    """Colour the patches that a word was read from, the stronger the more heads looked there."""
    from matplotlib.patches import Rectangle

    for token in np.flatnonzero(looks):
        if (patch := patch_inside(sight.kept.geometry, token)) is not None:
            left, top, right, bottom = patch
            strength = 0.25 + 0.5 * looks[token] / looks.max()
            area = Rectangle((left, top), right - left, bottom - top, facecolor=colour)
            area.set(alpha=strength, linewidth=0)
            axes.add_patch(area)


def _draw_share(axes: Any, sight: Sight) -> None:
    kept = sight.kept
    share = token_map(kept.geometry, kept.share())
    top = max(float(share.max()), 1e-9)
    show_pixels(axes, grey(kept.image, 0.35))
    show_pixels(axes, share, cmap="inferno", alpha=0.62, vmin=0, vmax=top)
    title, note = "nothing was pruned", "the budget covers the prompt"
    if kept.pruned:
        title, note = (
            "how many heads kept it",
            f"of {len(kept.by_head)} KV heads; brightest: {top:.0%}",
        )
    picture_axes(axes, title, note)


def _write_answer(figure: Any, sight: Sight) -> None:
    """The question, and the answer's words in their colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    blocks = f"{sight.blocks.pruned} KV blocks instead of {sight.blocks.dense}"
    title = blocks if sight.kept.pruned else f"{sight.blocks.dense} KV blocks"
    figure.suptitle(title, x=0.02, y=0.975, ha="left")
    question = textwrap.shorten(sight.question, 110, placeholder=" ...")
    figure.text(0.02, 0.922, question, fontsize=10, color=FADED)
    renderer = FigureCanvasAgg(figure).get_renderer()
    x, y = 0.02, 0.888
    for index, word in enumerate(sight.words):
        text = figure.text(
            x, y, word.text, fontsize=11, color=word_colour(index), fontweight="bold"
        )
        width = text.get_window_extent(renderer).width / figure.bbox.width
        if x + width > 0.98 and x > 0.02:
            x, y = 0.02, y - 0.027
            text.set_position((x, y))
        if y < LOWEST:
            text.set_text("...")
            text.set_color(FADED)
            return
        x += width + 0.008


def print_sight(sight: Sight, console: Console) -> None:
    """Print the answer, where the visual heads looked for each word, and what was kept."""
    console.print(Text("Question  ", style="bold").append(printable(sight.question), style=""))
    answer = Text("Answer    ", style="bold")
    for index, word in enumerate(sight.words):
        answer.append(printable(word.text) + " ", style=f"not bold {word_colour(index)}")
    console.print(answer)
    heads = ", ".join(f"{layer}-{head}" for layer, head in sight.heads[:8])
    more = f" and {len(sight.heads) - 8} more" if len(sight.heads) > 8 else ""
    console.print(f"\nWatched   visual heads {heads}{more} (layer-head)", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("word")
    table.add_column("looks at the picture", justify="right")
    table.add_column("patches", justify="right")
    table.add_column("kept by the heads", justify="right")
    share = sight.kept.share()
    for index, word in enumerate(sight.words):
        seen = word.looks > 0
        kept = np.average(share, weights=word.looks) if seen.any() else 0.0
        table.add_row(
            Text(printable(word.text), style=word_colour(index)),
            f"{word.on_picture:.0%}",
            str(int(seen.sum())),
            f"{kept:.0%}" if seen.any() else "-",
        )
    console.print(table)
    console.print(_summary(sight), highlight=False)


def _summary(sight: Sight) -> str:
    if not sight.kept.pruned:
        return "The budget covers the prompt: nothing was pruned."
    counts = np.array([sight.kept.tokens_of(head) for head in sight.kept.by_head])
    return (
        f"Of {sight.kept.prompt_tokens} prompt tokens a head keeps {counts.min()} to "
        f"{counts.max()}, {np.median(counts):g} in the median: {sight.blocks.pruned} KV blocks "
        f"instead of {sight.blocks.dense}."
    )
