"""How our pictures look."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm_vllm.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FADED, ACCENT = "#1b1f24", "#6b7280", "#d9480f"


def save_figure(figure: "Figure", path: Path) -> None:
    """Save a figure as a PNG that is never half written.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())


STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a model's name may have dollar signs
    "axes.edgecolor": "#d0d4da",
    "axes.labelcolor": FADED,
    "xtick.color": FADED,
    "ytick.color": FADED,
}


class PictureError(ValueError):
    """A picture that cannot be made."""


def _plain_axes(axes: Any) -> None:
    axes.grid(color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
