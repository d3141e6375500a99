"""Full-size models for benchmarks, all but their weights: for vLLM's ``--load-format dummy``.

Configuration, processor, chat template, a synthetic tokenizer and a synthetic head profile are
written from the published numbers: nothing is downloaded, and nothing here is of use to a model
with real weights.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from gpu_parts.records import ROOT, digest

NAMES = ("llava-1.5-7b", "llava-next-vicuna-7b", "llava-next-mistral-7b", "qwen2-vl-7b")
FOLDER = ROOT / ".cache" / "models"
MADE_BY = "made-by.txt"  # the last file that is written


def prepare(name: str, folder: Path = FOLDER) -> Path:
    """The folder of a model, made if it is missing or of another version of this code.

    Its head profile is ``profile.json`` in there.

    Args:
        name: one of `NAMES`.
        folder: that the models' folders lie in.

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

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{name}.") as scratch:
        part = Path(scratch)
        write_model(name, part)
        (part / MADE_BY).write_text(made_by)
        # File by file, so that whoever made or reads the same folder meanwhile is not disturbed.
        for file in sorted(part.iterdir(), key=lambda file: file.name == MADE_BY):
            file.chmod(0o644)
            os.replace(file, out / file.name)
    return out
