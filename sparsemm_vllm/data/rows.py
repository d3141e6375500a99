"""Rows of a data set, as plain Python values: their pictures, and the words with their boxes."""

import io
import math
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sparsemm_vllm.data.pictures import Box, Word
from sparsemm_vllm.data.samples import DataError

Row = dict[str, Any]

IMAGE_COLUMNS = ("image", "image_name", "file_name", "image_path")
OVERHANG = 1.0  # pixels by which a rounded box may reach over the picture's edge


class SkippedError(Exception):
    """A sample or a word cannot be used; the message is the reason, to be counted."""


@dataclass(frozen=True)
class Table:
    """A data set's rows, read one at a time.

    Attributes:
        path: file or folder that the user named, for messages.
        count: number of rows.
        columns: names of the columns; a row may lack some of them.
        read: function from the index of a row, from 0, to the row.
        folders: folders of the pictures that rows name by relative path.
        category_names: names of the numbers in `category` columns; empty if no file tells them.
    """

    path: Path
    count: int
    columns: frozenset[str]
    read: Callable[[int], Row]
    folders: tuple[Path, ...] = ()
    category_names: tuple[str, ...] = ()

    def check_images(self) -> None:
        """Raise `DataError` if no row has a picture."""
        if not self.columns & set(IMAGE_COLUMNS):
            raise DataError(
                f"{self.path}: no row has a picture; one of the columns "
                f"{', '.join(IMAGE_COLUMNS)} must hold it or name its file"
            )


def read_image(row: Row, folders: Sequence[Path]) -> Image.Image:
    """A row's picture, RGB.

    Raises:
        SkippedError: if there is none, or it cannot be decoded.
    """
    value = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes):
        raise SkippedError("no image")
    try:
        with Image.open(
            _find(value, folders) if isinstance(value, str) else io.BytesIO(value)
        ) as f:
            pixels = f.convert("RGB")
    except (
        OSError,
        SyntaxError,  # what Pillow raises for broken PNG files
        ValueError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ):
        raise SkippedError("image unreadable") from None
    pixels.info.clear()  # boxes are of the pixels as stored: nobody may turn them by EXIF later
    return pixels


def _find(name: str, folders: Sequence[Path]) -> Path:
    """The file of that name in the likely folders: by the whole name, or by its last part alone."""
    candidates = [folder / part for part in (name, Path(name).name) for folder in folders]
    for path in candidates:
        if path.is_file():
            return path
    raise SkippedError("image file not found")


def records(value: Any) -> list[Row]:
    """A list of records, or the columns of one, as a list of records.

    Raises:
        SkippedError: if it is neither.
    """
    if isinstance(value, dict):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        if len({len(column) for column in columns.values()}) == 1:
            return [
                dict(zip(columns, cells, strict=True))
                for cells in zip(*columns.values(), strict=True)
            ]
    elif isinstance(value, list) and all(isinstance(record, dict) for record in value):
        return value
    raise SkippedError("annotations malformed")


def make_words(
    annotated: Sequence[tuple[Any, Any]], size: tuple[int, int], skipped: Counter[str]
) -> list[Word]:
    """Words of one picture; what is wrong with the others is counted.

    Args:
        annotated: text and corners ``((x, y), ...)`` of each word, in pixels of the picture.
        size: width and height of the picture, in pixels.
        skipped: counts of words by reason, changed in place.

    Raises:
        SkippedError: if no word is left.
    """
    words = []
    for text, corners in annotated:
        try:
            words.append(Word(_text(text), _box(corners, size)))
        except SkippedError as error:
            skipped[f"words: {error}"] += 1
    if not words:
        raise SkippedError("no usable word")
    return words


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SkippedError("no text")
    return " ".join(value.split())


def _box(corners: Any, size: tuple[int, int]) -> Box:
    """The pixels that a polygon's bounding box touches."""
    try:
        xs, ys = zip(*((float(x), float(y)) for x, y in corners), strict=True)
    except (TypeError, ValueError):
        raise SkippedError("box malformed") from None
    if len(xs) < 2 or not all(map(math.isfinite, (*xs, *ys))):
        raise SkippedError("box malformed")
    width, height = size
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    if min(left, top) < -OVERHANG or right > width + OVERHANG or bottom > height + OVERHANG:
        raise SkippedError("box outside the picture")
    box = (
        max(0, math.floor(left)),
        max(0, math.floor(top)),
        min(width, math.ceil(right)),
        min(height, math.ceil(bottom)),
    )
    if box[0] >= box[2] or box[1] >= box[3]:
        raise SkippedError("box without area")
    return box
