"""Rows of Parquet files, by pyarrow, and of Arrow files, by `datasets`, which writes them.

`datasets` would read Parquet in its order only, or after it had copied all rows to an Arrow file.
It would also turn some pictures without their boxes, and download those named by an address.

Both packages are optional, and therefore imported late.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from sparsemm_vllm.data.rows import Row, Table
from sparsemm_vllm.data.samples import DataError


def parquet_table(path: Path, files: list[Path]) -> Table:
    """All rows of Parquet files, in the files' order; a row costs reading its row group.

    Raises:
        DataError: if a package is not installed, or the files cannot be read.
    """
    with _one_error(path):
        from pyarrow.parquet import ParquetFile

        opened = [ParquetFile(file) for file in files]
        groups = [(file, group) for file in opened for group in range(file.num_row_groups)]
        sizes = [file.metadata.row_group(group).num_rows for file, group in groups]
        schema = opened[0].schema_arrow
    ends = list(accumulate(sizes))

    @lru_cache(maxsize=2)
    def read_group(number: int) -> Any:
        file, group = groups[number]
        with _one_error(path):
            return file.read_row_group(group)

    def read(index: int) -> Row:
        number = bisect_right(ends, index)
        row = index - ends[number] + sizes[number]
        return read_group(number).slice(row, 1).to_pylist()[0]

    return _table(path, sum(sizes), schema, read)


def arrow_table(path: Path, files: list[Path]) -> Table:
    """All rows of Arrow files, as `datasets`' ``save_to_disk`` writes them; mapped, not loaded.

    Raises:
        DataError: if a package is not installed, or the files cannot be read.
    """
    with _one_error(path):
        from datasets import Dataset, concatenate_datasets

        whole = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    rows = whole.with_format("arrow")  # pictures stay encoded
    schema = whole.features.arrow_schema
    return _table(path, len(rows), schema, lambda index: rows[index].to_pylist()[0])


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, ValueError) as error:  # pyarrow's errors are of the last two
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, ImportError):
            reason += "; pip install datasets (it brings pyarrow)"
        raise DataError(f"{path}: cannot be read: {reason}") from None


def _table(path: Path, count: int, schema: Any, read: Any) -> Table:
    folder = path if path.is_dir() else path.parent
    folders = folder, folder / "images", folder / "data"
    with _one_error(path):
        names = _category_names(schema)
    return Table(path, count, frozenset(schema.names), read, folders, names)


def _category_names(schema: Any) -> tuple[str, ...]:
    """Names of the classes of the first ``category`` feature that `datasets` described."""
    if b"huggingface" not in (schema.metadata or {}):
        return ()
    from datasets import Features

    waiting = list(Features.from_arrow_schema(schema).items())
    while waiting:
        name, feature = waiting.pop()
        if name == "category" and hasattr(feature, "names"):
            return tuple(feature.names)
        if isinstance(feature, dict):
            waiting += feature.items()
        elif hasattr(feature, "feature"):
            waiting.append((name, feature.feature))
    return ()
