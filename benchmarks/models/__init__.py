"""Full-size models for benchmarks, all but their weights: for vLLM's ``--load-format dummy``.

Configuration, processor, chat template, a synthetic tokenizer and a synthetic head profile are
written from the published numbers: nothing is downloaded, and nothing here is of use to a model
with real weights.
"""

from importlib.metadata import version
from pathlib import Path

from common import ROOT, digest, files_of

NAMES = ("llava-1.5-7b", "llava-next-vicuna-7b", "llava-next-mistral-7b", "qwen2-vl-7b")
FOLDER = ROOT / ".cache" / "models"
MADE_BY = "made-by.txt"  # the last file that is written


def prepare(name: str, folder: Path = FOLDER) -> Path:
    """The folder of a model, made if it is missing or of another version of this code.

    Its head profile is ``profile.json`` in there.

    Args:
        name: name of `NAMES`.
        folder: folder that the models' folders lie in.

    Raises:
        ValueError: naming the models, if there is none of this name.
    """
    if name not in NAMES:
        raise ValueError(f"there is no model {name!r}: choose one of {', '.join(NAMES)}")
    out = Path(folder).resolve() / name
    made_by = f"code {digest(Path(__file__).parent)}, transformers {version('transformers')}\n"
    mark = out / MADE_BY
    if mark.exists() and mark.read_text() == made_by:
        return out
    from .writing import write_model  # imports transformers, which takes seconds

    with files_of(out, last=MADE_BY) as part:
        write_model(name, part)
        (part / MADE_BY).write_text(made_by)
    return out
