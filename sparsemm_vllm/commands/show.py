"""A head profile as a picture: where the scores are, how concentrated, and what a budget gives.

Matplotlib is imported in functions: printing a profile does not need it.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sparsemm_vllm.budget.plan import build_layout, check_sizes, printable, tokens_per_head
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.commands.figures import (
    ACCENT,
    FADED,
    INK,
    PictureError,
    plot_axes,
    save_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Ten steps of matplotlib's perceptually uniform maps magma and viridis; importing it takes longer
# than all the rest of the command.
MAGMA = (
    "#000004", "#180f3d", "#440f76", "#721f81", "#9e2f7f",
    "#cd4071", "#f1605d", "#fd9668", "#feca8d", "#fcfdbf",
)  # fmt: skip
VIRIDIS = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e",
    "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip
FIRST_LIGHT = 5  # steps from here on carry dark digits
TOP_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
BAR = 30  # columns of the longest bar
MARKED_SHARES = (0.05, 0.1)
MOST_NUMBERED = (12, 8)  # rows and columns up to which a picture's cells are parted and numbered
MOST_TICKS = 12


def cumulative_mass(profile: HeadProfile) -> np.ndarray:
    """Share of all scores that the best ``i + 1`` query heads hold, ``[L * Hq]``."""
    ranked = np.sort(np.ravel(profile.scores))[::-1]
    return np.cumsum(ranked) / ranked.sum()


def heads_in(share: float, heads: int) -> int:
    """How many heads a share of them is: the nearest number, and at least one."""
    return max(1, round(share * heads))


def _steps(values: np.ndarray, top: float) -> np.ndarray:
    """Values from 0 to `top` as steps 0 to 9 of their square roots."""
    return np.rint(9 * np.sqrt(values / top)).astype(int)


def _cells(steps: np.ndarray, labels: np.ndarray, colours: tuple[str, ...]) -> Text:
    """Rows of coloured cells, numbered; the labels tell the steps where there is no colour."""
    gutter = len(str(len(steps) - 1))
    rows = Text(no_wrap=True)
    for layer, (row, texts) in enumerate(zip(steps, labels, strict=True)):
        rows.append(f"{layer:>{gutter + 2}} ", style="dim")
        for step, label in zip(row, texts, strict=True):
            ink = "#000000" if step >= FIRST_LIGHT else "#ffffff"
            rows.append(label, Style(color=ink, bgcolor=colours[step]))
        rows.append("\n")
    rows.right_crop(1)
    return rows


def _digits(steps: np.ndarray, width: int) -> np.ndarray:
    """Cells of one digit, a point for 0, as wide as fits: two columns or one."""
    gap = " " if 2 * steps.shape[1] + 6 <= width else ""
    return np.array([gap + ("·" if step == 0 else str(step)) for step in range(10)])[steps]


def _numbers(kept: np.ndarray, width: int) -> np.ndarray | None:
    """Cells of the numbers themselves, or nothing if they do not fit."""
    cell = len(str(kept.max())) + 1
    if kept.shape[1] * cell + 6 > width:
        return None
    return np.array([[f"{tokens:>{cell}}" for tokens in row] for row in kept])


def describe(profile: HeadProfile) -> str:
    """What is known of how a profile was made, in one line."""
    parts = {
        "mode": profile.mode,
        "data": profile.data,
        "samples": profile.samples or profile.provenance.get("samples"),
        "split-half correlation": profile.split_half,
        "source": profile.provenance.get("source"),
        "made": (profile.created or str(profile.provenance.get("date", "")))[:10],
    }
    known = {name: value for name, value in parts.items() if value not in (None, "")}
    return printable(", ".join(f"{name} {value}" for name, value in known.items()))


def budget_line(kept: np.ndarray, prompt_tokens: int) -> str:
    """Smallest, median, mean and largest number of kept tokens, and how many heads keep all."""
    whole = int((kept == prompt_tokens).sum())
    return (
        f"{kept.min():,} min, {np.median(kept):,g} median, {kept.mean():,.1f} mean, "
        f"{kept.max():,} max; {whole:,} of {kept.size:,} keep the whole prompt"
    )


def kept_per_head(profile: HeadProfile, settings: Settings, prompt_tokens: int) -> np.ndarray:
    """Prompt tokens that each KV head keeps, window included: int64 ``[L, Hkv]``.

    Raises:
        PlanError: for a prompt without tokens.
    """
    check_sizes(prompt_tokens=prompt_tokens)
    return tokens_per_head(build_layout(profile, settings), prompt_tokens)


def _method_note(settings: Settings) -> str:
    """What is not the default."""
    named = [settings.method] if settings.method != "sparsemm" else []
    return ", ".join(named + ["redistributed"] * settings.redistribute)


def print_profile(
    profile: HeadProfile, settings: Settings, prompt_tokens: int, console: Console
) -> None:
    """Print the scores, how concentrated they are, and the tokens that a budget gives each head.

    Raises:
        PlanError: for a prompt without tokens.
    """
    kept = kept_per_head(profile, settings, prompt_tokens)
    console.print(Text("Head profile of ", style="bold").append(printable(profile.model_id)))
    shape = (
        f"{profile.num_layers} layers, {profile.num_query_heads} query heads, "
        f"{profile.num_kv_heads} KV heads"
    )
    made = describe(profile)
    console.print(Text(shape + (f"; {made}" if made else ""), style="dim"))
    _print_scores(np.array(profile.scores), console)
    _print_mass(cumulative_mass(profile), console)
    heading = ", ".join(filter(None, (f"Budget {settings.budget:,}", _method_note(settings))))
    _heading(heading, f"prompt tokens per KV head, of {prompt_tokens:,}", console)
    _print_kept(kept, prompt_tokens, console)


def _heading(title: str, note: str, console: Console) -> None:
    console.print(Text(f"\n{title}  ", style="bold").append(note, style="not bold dim"))


def _legend(top: float, form: str) -> str:
    """What some of the steps stand for."""
    steps = (1, 3, 5, 7, 9)
    return ", ".join(f"{step} = {form.format((step / 9) ** 2 * top)}" for step in steps)


def _print_scores(scores: np.ndarray, console: Console) -> None:
    _heading("Visual scores", "layers down, query heads across", console)
    top = scores.max()
    steps = _steps(scores, top)
    console.print(_cells(steps, _digits(steps, console.width), MAGMA), soft_wrap=True)
    least = (0.5 / 9) ** 2 * top
    console.print(Text(f"   · = less than {least:.2g}, {_legend(top, '{:.2g}')}", style="dim"))


def _print_mass(mass: np.ndarray, console: Console) -> None:
    _heading("Concentration", "share of all scores that the best heads hold", console)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column(justify="right")
    for share in TOP_SHARES:
        count = heads_in(share, len(mass))
        held = mass[count - 1]
        filled = round(BAR * held)
        bar = Text("█" * filled, style=MAGMA[6]).append("░" * (BAR - filled), style="dim")
        heads = f"{count:,} head{'s' if count > 1 else ''}"
        table.add_row(f"   top {share:.0%}", heads, f"{held:4.0%}", bar)
    console.print(table)


def _print_kept(kept: np.ndarray, prompt_tokens: int, console: Console) -> None:
    steps = _steps(kept, prompt_tokens)
    numbers = _numbers(kept, console.width)
    labels = _digits(steps, console.width) if numbers is None else numbers
    console.print(_cells(steps, labels, VIRIDIS), soft_wrap=True)
    if numbers is None:
        console.print(Text(f"   {_legend(prompt_tokens, '{:,.0f}')}", style="dim"))
    console.print(Text(f"   {budget_line(kept, prompt_tokens)}"))


def draw_profile(profile: HeadProfile, settings: Settings, prompt_tokens: int, path: Path) -> None:
    """Save the same as a PNG.

    Raises:
        PictureError: for the name of another kind of picture.
        PlanError: for a prompt without tokens.
        OSError: if the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise PictureError(f"--out {path}: the picture is a PNG, name it so: {path.stem}.png")
    kept = kept_per_head(profile, settings, prompt_tokens)
    with styled():
        save_figure(profile_figure(profile, settings, kept, prompt_tokens), path)


def profile_figure(
    profile: HeadProfile, settings: Settings, kept: np.ndarray, prompt_tokens: int
) -> "Figure":
    """Scores and kept tokens of each head above, both ranked below; to be drawn in `styled`.

    Args:
        profile: scores of the model's heads.
        settings: settings of the server; their profile is not looked at.
        kept: prompt tokens that each KV head keeps, window included, int ``[L, Hkv]``.
        prompt_tokens: length of the prompt, in tokens.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.6, 9.6))
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    scores = np.array(profile.scores)
    _heatmap(top_left, scores, "magma", scores.max(), "{:.2g}")
    _title(top_left, "Visual scores", "colour by square root")
    _label_heads(top_left, profile)
    _heatmap(top_right, kept, "viridis", prompt_tokens, "{:,.0f}")
    sizes = f"budget {settings.budget:,}, prompt {prompt_tokens:,}"
    _title(top_right, "Tokens kept", "\n".join(filter(None, (_method_note(settings), sizes))))
    top_right.set_xlabel("KV head")
    _mass_curve(bottom_left, cumulative_mass(profile))
    _title(bottom_left, "Cumulative score", "best query heads first")
    _kept_curve(bottom_right, kept, settings.budget, prompt_tokens)
    spread = f"{kept.max():,} to {kept.min():,}, median {np.median(kept):,g}"
    _title(bottom_right, "By rank", f"{spread}, mean {kept.mean():,.1f}")
    _headline(figure, profile)
    figure.subplots_adjust(left=0.06, right=0.925, top=0.865, bottom=0.06, wspace=0.32, hspace=0.3)
    return figure


def _title(axes: Any, title: str, note: str) -> None:
    axes.set_title(title, pad=9)
    axes.set_title(note, fontsize=9.5, fontweight="normal", color=FADED, loc="right", pad=9)


def _headline(figure: Any, profile: HeadProfile) -> None:
    name = printable(profile.model_id)
    name = name if len(name) <= 70 else f"{name[:69]}…"
    figure.suptitle(name, x=0.06, y=0.968, ha="left", va="center")
    shape = (
        f"{profile.num_layers} layers, {profile.num_query_heads} query heads and "
        f"{profile.num_kv_heads} KV heads each"
    )
    made = describe(profile)
    line = f"{shape}   |   {made}" if made else shape
    line = line if len(line) <= 150 else f"{line[:149]}…"
    figure.text(0.06, 0.935, line, fontsize=10, color=FADED, va="center")


def _heatmap(axes: Any, values: np.ndarray, colours: str, top: float, form: str) -> None:
    """Cells ``[L][heads]``, layer 0 at the top; numbered if there are few."""
    from matplotlib.colors import PowerNorm

    rows, columns = values.shape
    few = rows <= MOST_NUMBERED[0] and columns <= MOST_NUMBERED[1]
    norm = PowerNorm(0.5, vmin=0, vmax=top)
    mesh = axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        values,
        cmap=colours,
        norm=norm,
        edgecolors="white",
        linewidth=1.5 if few else 0,
    )
    axes.invert_yaxis()
    axes.set_ylabel("layer")
    axes.set_xticks(_ticks(columns))
    axes.set_yticks(_ticks(rows))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes([1.025, 0, 0.035, 1]))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5)
    bar.ax.minorticks_off()
    ticks = [top * share for share in (0, 0.04, 0.16, 0.36, 0.64, 1)]
    bar.set_ticks(ticks, labels=[form.format(tick) for tick in ticks])
    if few:
        for (row, column), value in np.ndenumerate(values):
            ink = "black" if norm(value) > 0.6 else "white"
            number = form.format(value)
            axes.text(column, row, number, ha="center", va="center", fontsize=8, color=ink)


def _ticks(count: int) -> np.ndarray:
    """Indexes to number, a power of two apart."""
    return np.arange(0, count, 2 ** max(0, math.ceil(math.log2(count / MOST_TICKS))))


def _label_heads(axes: Any, profile: HeadProfile) -> None:
    """Name the columns, and part the groups of query heads that share a KV head."""
    group = profile.num_query_heads // profile.num_kv_heads
    if group == 1:
        axes.set_xlabel("query head")
        return
    axes.set_xlabel(f"query head, {group} to a KV head")
    for first in range(group, profile.num_query_heads, group):
        axes.axvline(first - 0.5, color="white", linewidth=min(3.5, 96 / len(profile.scores[0])))


def _mass_curve(axes: Any, mass: np.ndarray) -> None:
    """The score that the best heads hold, the best 5 % and 10 % marked."""
    from matplotlib.patheffects import withStroke

    heads = len(mass)
    x = np.arange(heads + 1) / heads
    axes.plot([0, 1], [0, 1], color=FADED, linewidth=1, linestyle=(0, (2, 3)))
    axes.plot(x, [0, *mass], color=INK, linewidth=2)
    axes.fill_between(x, [0, *mass], color=INK, alpha=0.05, linewidth=0)
    lowest = 0.0
    right = min(0.07 + max(0.1, heads_in(MARKED_SHARES[-1], heads) / heads), 0.35)
    for share in MARKED_SHARES:
        count = heads_in(share, heads)
        held = mass[count - 1]
        y = min(max(held - 0.02, lowest), 0.93 if share == MARKED_SHARES[-1] else 0.85)
        lowest = y + 0.075
        axes.vlines(count / heads, 0, held, color=ACCENT, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(count / heads, held, "o", color=ACCENT, markersize=6, clip_on=False)
        text = f"top {share:.0%} ({count} head{'s' if count > 1 else ''}): {held:.0%}"
        axes.text(
            right, y, text, color=ACCENT, va="center", fontsize=10.5, fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    axes.text(0.97, 0.72, "even scores", color=FADED, fontsize=9, ha="right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(f"share of the {heads:,} query heads")
    axes.set_ylabel("share of all scores")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    plot_axes(axes)


def _kept_curve(axes: Any, kept: np.ndarray, budget: int, prompt_tokens: int) -> None:
    """Kept tokens of the KV heads, largest first, beside the even budget."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    ranked = np.sort(kept.ravel())[::-1]
    edges = np.arange(len(ranked) + 1) + 0.5
    even = min(budget, prompt_tokens)
    colour = VIRIDIS[4]
    axes.stairs(ranked, edges, fill=True, color=colour, alpha=0.15, linewidth=0)
    axes.stairs(ranked, edges, baseline=None, color=colour, linewidth=2)
    axes.axhline(even, color=FADED, linewidth=1, linestyle=(0, (2, 3)))
    axes.annotate(
        f"even: {even:,}", (1, even), (-4, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", color=FADED, fontsize=9, ha="right",
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(0.5, len(ranked) + 0.5)
    axes.set_ylim(ranked.min() / 1.5, prompt_tokens * 1.3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.set_xlabel(f"rank among the {len(ranked):,} KV heads")
    axes.set_ylabel("tokens, log scale")
    plot_axes(axes)
