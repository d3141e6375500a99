"""How our pictures look: one style, and what all of them need."""

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm_vllm.errors import UserError
from sparsemm_vllm.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FADED, ACCENT = "#1b1f24", "#6b7280", "#d9480f"
FRAME, GRID = "#d0d4da", "#eceef1"

STYLE = {
    "font.size": 9.5,
    "figure.facecolor": "white",
    "figure.titlesize": 15,
    "figure.titleweight": "bold",
    "text.color": INK,
    "text.parse_math": False,  # a model's name may have dollar signs
    "axes.edgecolor": FRAME,
    "axes.labelcolor": FADED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FADED,
    "ytick.color": FADED,
}


class PictureError(UserError):
    """A picture that cannot be made, or cannot be read."""


def styled() -> AbstractContextManager[None]:
    """Our style, for figures that are made and saved inside; the process keeps its own."""
    import matplotlib  # takes longer than all the rest of some commands

    return matplotlib.rc_context(STYLE)


def save_figure(figure: "Figure", path: Path) -> None:
    """Save a figure as a PNG that is never half written.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())


def plot_axes(axes: Any) -> None:
    """Make axes those of a plot: a faint grid below it, no ticks, no frame above and right."""
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def picture_axes(axes: Any, title: str, note: str) -> None:
    """Make axes those of a picture: a frame, a title above it, a note below it."""
    axes.set_anchor("NW")
    axes.set_title(title, fontsize=10.5)
    axes.set_xlabel(note, fontsize=8.5, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
