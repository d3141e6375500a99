"""The model that comes with this package."""

from importlib import resources
from pathlib import Path

READER = "sparsemm-reader"


def reader_folder() -> Path:
    """The folder with the model's files."""
    return Path(str(resources.files(__name__)))
