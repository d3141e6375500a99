"""`sparsemm look`: what the command does and says."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError
from rich.console import Console

from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.commands.figures import PictureError
from sparsemm_vllm.commands.look.draw import check_picture, draw_sight, print_sight
from sparsemm_vllm.commands.look.run import look
from sparsemm_vllm.profiler.engine import parse_engine_options, prepare_process


def run_look(
    model: str,
    image: Path,
    question: str,
    out: Path,
    settings: Settings,
    max_tokens: int,
    engine_arguments: list[str],
    console: Console,
) -> None:
    """Ask, print and draw; see `look`.

    Args:
        model: name or folder of the model.
        image: file of the picture.
        question: text beside the picture.
        out: file for the PNG.
        settings: settings of SPARSEMM.
        max_tokens: most tokens of the answer.
        engine_arguments: options of `vllm serve`.
        console: terminal to print on.

    Raises:
        UserError, OSError: one line that says why.
    """
    check_picture(out)
    picture = _open(image)
    prepare_process()
    options = parse_engine_options(engine_arguments)
    with console.status("vLLM starts"):
        sight = look(model, picture, question, settings, max_tokens, **options)
    print_sight(sight, console)
    draw_sight(sight, out)
    console.print(f"\nsaved {out}", highlight=False, markup=False, soft_wrap=True)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise PictureError(f"{path} is no picture that can be read") from None
