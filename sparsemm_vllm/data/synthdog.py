"""The data set synthdog-en-detection: synthetic documents with the boxes of their text.

Its rows (huggingface.co/datasets/nnethercott/synthdog-en-detection) hold ``image`` and, under each
of four columns, a list of ``{"chunk": text, "coord": [[x, y], ...]}``: two opposite corners or all
four, in pixels or as fractions of the picture's size. SparseMM measured its scores on ``2_coord``.
"""

from collections import Counter
from typing import Any

from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.data.rows import Row, SkippedError, Table, make_words, read_image, records

QUESTION = "Provide all the OCR results of this image."  # SparseMM's


class SynthdogFormat:
    """Makes samples of rows.

    Raises:
        DataError: if the rows have no pictures.
    """

    name = "synthdog-en-detection"
    columns = "2_coord", "4_coord", "2_coord_norm", "4_coord_norm"

    def __init__(self, table: Table) -> None:
        table.check_images()
        self._folders = table.folders

    def sample(self, row: Row, skipped: Counter[str]) -> Sample:
        """The sample of a row: all its words are to be read, in the data set's order.

        Raises:
            SkippedError: if the row cannot be used. Unusable words are counted in `skipped`.
        """
        column = next((name for name in self.columns if row.get(name)), None)
        if column is None:
            raise SkippedError("no words")
        chunks = records(row[column])
        image = read_image(row, self._folders)
        scale = image.size if column.endswith("_norm") else (1, 1)
        annotated = [(chunk.get("chunk"), _scaled(chunk.get("coord"), scale)) for chunk in chunks]
        words = tuple(make_words(annotated, image.size, skipped))
        answer = " ".join(word.text for word in words)
        return Sample(image, words, QUESTION, answer, tuple(range(len(words))))


def _scaled(corners: Any, scale: tuple[int, int]) -> Any:
    """Corners in pixels; what is malformed is left for `make_words` to find."""
    try:
        return [(x * scale[0], y * scale[1]) for x, y in corners]
    except (TypeError, ValueError):
        return None
