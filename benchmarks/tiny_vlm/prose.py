"""Natural text for a language model of one token a character.

Training text is the documentation in Python's standard library (PSF licence): the language
reference of ``pydoc_data.topics`` and the docstrings of its modules. Held-out text is this
project's licence.
"""

import ast
import re
import string
import sysconfig
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

HELD_OUT = Path(__file__).resolve().parent.parent.parent / "LICENSE"
MIN_DOCSTRING = 200  # characters


@lru_cache(maxsize=1)
def training_text() -> str:
    """About 1.7 million characters, printable ASCII, runs of white space made one blank."""
    parts = [topics[name] for name in sorted(topics)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts):
            parts += docstrings(path)
    return plain(" ".join(parts))


@lru_cache(maxsize=1)
def held_out_text() -> str:
    """About 10 thousand characters that no model was trained on."""
    return plain(HELD_OUT.read_text(encoding="utf-8"))


def excerpt(text: str, rng: np.random.Generator, characters: int) -> str:
    """A random piece of a text that begins with a word."""
    start = int(rng.integers(len(text) - 2 * characters))
    start = text.index(" ", start) + 1
    return text[start : start + characters]


def docstrings(path: Path) -> list[str]:
    """The long docstrings of a Python file."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the standard library carries a few files that are meant to fail
        return []
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in texts if text and len(text) >= MIN_DOCSTRING]


def plain(text: str) -> str:
    """Printable ASCII only, runs of white space made one blank."""
    printable = set(string.printable[:95])
    return "".join(c for c in re.sub(r"\s+", " ", text) if c in printable)
