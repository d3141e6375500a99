"""Rows of Parquet files and of folders that `datasets` saves; pyarrow reads both."""

import json
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
        DataError: if pyarrow is not installed, or cannot read them.
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
        return _row(read_group(number), index - ends[number] + sizes[number])

    return _table(path, sum(sizes), schema, read)


def arrow_table(path: Path, files: list[Path]) -> Table:
    """All rows of Arrow files, as `datasets`' ``save_to_disk`` writes them; mapped, not loaded.

    Raises:
        DataError: if pyarrow is not installed, or cannot read them.
    """
    with _one_error(path):
        import pyarrow

        parts = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(f))).read_all() for f in files]
        whole = pyarrow.concat_tables(parts)
    return _table(path, whole.num_rows, whole.schema, lambda index: _row(whole, index))


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise DataError(
            f"{path}: pyarrow reads such files and is not installed; pip install pyarrow"
        ) from None
    except (OSError, ValueError) as error:  # pyarrow's errors are of these two kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read: {reason}") from None


def _row(table: Any, index: int) -> Row:
    return table.slice(index, 1).to_pylist()[0]


def _table(path: Path, count: int, schema: Any, read: Any) -> Table:
    folder = path if path.is_dir() else path.parent
    folders = folder, folder / "images", folder / "data"
    return Table(path, count, frozenset(schema.names), read, folders, _category_names(schema))


def _category_names(schema: Any) -> tuple[str, ...]:
    """Names of the classes of the first ``category`` feature that `datasets` described."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    waiting = [about.get("info", {}).get("features", {})]
    while waiting:
        feature = waiting.pop()
        if isinstance(feature, list):
            waiting += feature
        elif isinstance(feature, dict):
            category = feature.get("category")
            for found in (category, (category or {}).get("feature")):
                if isinstance(found, dict) and found.get("names"):
                    return tuple(found["names"])
            waiting += feature.values()
    return ()
