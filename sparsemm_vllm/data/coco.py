"""Data sets in the format of COCO detection: pictures with named objects in boxes.

Two conventions are told apart by the objects' fields. With ``bbox_id`` (the data sets at
huggingface.co/detection-datasets, and the files that SparseMM makes of them) a ``bbox`` is
``[x0, y0, x1, y1]``; without it, as in COCO's own files, it is ``[x, y, width, height]``. Both are
in pixels.
"""

from collections import Counter
from typing import Any

from sparsemm_vllm.data.pictures import Sample, Word
from sparsemm_vllm.data.rows import Row, SkippedError, Table, make_words, read_image, records
from sparsemm_vllm.data.samples import DataError

QUESTION = "Which objects are in the picture? Answer with their names only."


class CocoFormat:
    """Makes samples of rows.

    Raises:
        DataError: if the rows have no pictures.
    """

    name = "coco-detection"
    columns = "objects", "content"

    def __init__(self, table: Table) -> None:
        table.check_images()
        self._table = table

    def sample(self, row: Row, skipped: Counter[str]) -> Sample:
        """The sample of a row: the words are the objects whose name occurs once, largest first.

        Raises:
            SkippedError: if the row cannot be used. Unusable objects are counted in `skipped`.
            DataError: if objects have numbers for names, and nothing tells the names.
        """
        value = next((row[name] for name in self.columns if row.get(name)), None)
        if value is None:
            raise SkippedError("no objects")
        objects = [(self._name(record), record) for record in records(value)]
        image = read_image(row, self._table.folders)
        names = Counter(name for name, _ in objects)
        crowds = {name for name, record in objects if record.get("iscrowd")}
        single = [(name, _corners(record)) for name, record in objects
                  if names[name] == 1 and name not in crowds]  # fmt: skip
        if not single:
            raise SkippedError("no object whose name occurs once")
        words = tuple(sorted(make_words(single, image.size, skipped), key=_area, reverse=True))
        answer = ", ".join(word.text for word in words)
        return Sample(image, words, QUESTION, answer, tuple(range(len(words))))

    def _name(self, record: Row) -> Any:
        category = record.get("category")
        if not isinstance(category, int):
            return category
        names = self._table.category_names
        if not names:
            raise DataError(
                f"{self._table.path}: objects have numbers for categories, and no file tells their "
                "names; put the names in place of the numbers"
            )
        return names[category] if 0 <= category < len(names) else None


def _corners(record: Row) -> Any:
    """Opposite corners; what is malformed is left for `make_words` to find."""
    try:
        x, y, third, fourth = record["bbox"]
        far = (third, fourth) if "bbox_id" in record else (x + third, y + fourth)
    except (KeyError, TypeError, ValueError):
        return None
    return (x, y), far


def _area(word: Word) -> int:
    left, top, right, bottom = word.box
    return (right - left) * (bottom - top)
