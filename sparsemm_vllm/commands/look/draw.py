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
from sparsemm_vllm.commands.figures import FADED, INK, STYLE, PictureError, save_figure
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.4, 8.0), facecolor="white")
        grid = figure.add_gridspec(
            3, 2, width_ratios=(3, 1), left=0.02, right=0.98, top=0.80, bottom=0.06,
            wspace=0.05, hspace=0.36,
        )  # fmt: skip
        _draw_looks(figure.add_subplot(grid[:, 0]), sight)
        _draw_share(figure.add_subplot(grid[0, 1]), sight)
        for row, (title, head) in enumerate(_examples(sight), 1):
            _draw_kept(figure.add_subplot(grid[row, 1]), sight, title, head)
        _write_answer(figure, sight)
        save_figure(figure, path)
        plt.close(figure)


def _examples(sight: Sight) -> list[tuple[str, tuple[int, int]]]:
    """The KV head of the best visual head, and one of median budget, where any was pruned."""
    if not sight.kept:
        return []
    layer, query_head = sight.heads[0]
    ranked = sorted(sight.kept, key=sight.tokens_of)
    return [
        ("the best visual head", (layer, query_head // sight.group)),
        ("a head of median budget", ranked[len(ranked) // 2]),
    ]


def _panel(axes: Any, title: str, note: str) -> None:
    axes.set_anchor("NW")
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(note, fontsize=8, color=FADED, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d4da")


def _show(axes: Any, sight: Sight, picture: np.ndarray) -> None:
    """Show pixels in the picture's own coordinates, in which patches are drawn."""
    width, height = sight.image.size
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _grey(sight: Sight, strength: float) -> np.ndarray:
    """The picture without colours, washed out to that strength, ``[height, width, 3]``."""
    grey = np.asarray(sight.image.convert("L"), dtype=np.float64)
    return np.repeat((255 - strength * (255 - grey))[..., None], 3, axis=2).astype(np.uint8)


def _patch(sight: Sight, token: int) -> tuple[tuple[float, float], float, float]:
    """Corner, width and height of a token's patch inside the picture."""
    width, height = sight.image.size
    left, top, right, bottom = sight.geometry.patches[token]
    left, right = max(left, 0), min(right, width)
    top, bottom = max(top, 0), min(bottom, height)
    return (left, top), right - left, bottom - top


def _draw_looks(axes: Any, sight: Sight) -> None:
    from matplotlib.patches import Rectangle

    _show(axes, sight, _grey(sight, 0.55))
    for index, word in enumerate(sight.words):
        most = max(1, int(word.looks.max(initial=0)))
        for token in np.flatnonzero(word.looks):
            if np.isnan(sight.geometry.patches[token]).any():  # a token that shows no part of it
                continue
            corner, width, height = _patch(sight, token)
            strength = 0.25 + 0.5 * word.looks[token] / most
            axes.add_patch(
                Rectangle(
                    corner, width, height, facecolor=word_colour(index), alpha=strength, linewidth=0
                )
            )
    heads = f"{len(sight.heads)} visual heads" if len(sight.heads) > 1 else "the best visual head"
    _panel(
        axes,
        "where it looked while it said each word",
        f"largest attention weights of {heads}\n{len(sight.positions)} of the prompt's "
        f"{sight.prompt_tokens} tokens are the picture's",
    )


def _token_map(sight: Sight, values: np.ndarray) -> np.ndarray:
    """Mean of the tokens' values at each pixel, 0 where no token shows it, ``[height, width]``."""
    width, height = sight.image.size
    total, count = np.zeros((2, height, width))
    for token in np.flatnonzero(~np.isnan(sight.geometry.patches).any(axis=1)):
        (left, top), wide, high = _patch(sight, token)
        rows = slice(round(top), round(top + high))
        columns = slice(round(left), round(left + wide))
        total[rows, columns] += values[token]
        count[rows, columns] += 1
    return total / np.maximum(count, 1)


def _draw_share(axes: Any, sight: Sight) -> None:
    share = _token_map(sight, sight.kept_share())
    top = max(float(share.max()), 1e-9)
    _show(axes, sight, _grey(sight, 0.35))
    axes.imshow(
        share,
        extent=axes.get_xlim() + axes.get_ylim(),
        cmap="inferno",
        alpha=0.62,
        vmin=0,
        vmax=top,
    )
    axes.set_xlim(0, sight.image.size[0])
    axes.set_ylim(sight.image.size[1], 0)
    if sight.kept:
        _panel(
            axes, "how many heads kept it", f"of {len(sight.kept)} KV heads; brightest: {top:.0%}"
        )
    else:
        _panel(axes, "nothing was pruned", "the budget covers the prompt")


def _draw_kept(axes: Any, sight: Sight, title: str, head: tuple[int, int]) -> None:
    kept = sight.kept_of(head)
    mask = _token_map(sight, kept.astype(float))[..., None] > 0
    picture = np.asarray(sight.image.convert("RGB"))
    _show(axes, sight, np.where(mask, picture, _grey(sight, 0.12)))
    _panel(
        axes, title, f"layer {head[0]}, KV head {head[1]}: {sight.tokens_of(head)} tokens,\n"
        f"{kept.sum()} of the picture"
    )  # fmt: skip


def _write_answer(figure: Any, sight: Sight) -> None:
    """The question, and the answer's words in their colours."""
    held, dense = sight.blocks
    figure.text(
        0.02, 0.955, f"{held} KV blocks instead of {dense}" if sight.kept else f"{dense} KV blocks",
        fontsize=15, color=INK, fontweight="bold",
    )  # fmt: skip
    question = textwrap.shorten(sight.question, 110, placeholder=" ...")
    figure.text(0.02, 0.922, question, fontsize=10, color=FADED)
    renderer = figure.canvas.get_renderer()
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
    share = sight.kept_share()
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
    held, dense = sight.blocks
    if sight.kept:
        counts = np.array([sight.tokens_of(head) for head in sight.kept])
        console.print(
            f"Of {sight.prompt_tokens} prompt tokens a head keeps {counts.min()} to "
            f"{counts.max()}, {np.median(counts):g} in the median: {held} KV blocks instead of "
            f"{dense}.",
            highlight=False,
        )
    else:
        console.print("The budget covers the prompt: nothing was pruned.")
