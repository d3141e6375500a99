"""Which files a path stands for."""

from pathlib import Path

from sparsemm_vllm.data.arrow_files import arrow_table, parquet_table
from sparsemm_vllm.data.json_files import json_table
from sparsemm_vllm.data.rows import Table
from sparsemm_vllm.data.samples import DataError

ABOUT_THE_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def open_table(path: Path) -> Table:
    """Open a data set's file or folder; its Parquet or Arrow files count as one table.

    Raises:
        DataError: if there is nothing that can be read.
    """
    try:
        path = path.expanduser()
        if path.is_file():
            return _open_files(path, [path])
        if path.is_dir():
            return _open_files(path, _files(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    raise DataError(f"{path}: no such file or folder; give 'ocr' or the path of a data set")


def _open_files(path: Path, files: list[Path]) -> Table:
    match files[0].suffix:
        case ".parquet":
            return parquet_table(path, files)
        case ".arrow":
            return arrow_table(path, files)
        case ".json" | ".jsonl":
            return json_table(files[0])
    raise DataError(f"{path}: not a .parquet, .arrow, .json or .jsonl file")


def _files(folder: Path) -> list[Path]:
    """The data files in a folder; JSON only if there is no other, and then one."""
    for suffix in ("parquet", "arrow"):
        files = [f for f in folder.rglob(f"*.{suffix}") if not f.name.startswith("cache-")]
        if files:
            return sorted(files)
    names = "instances_*.json", "annotations/instances_*.json", "*.jsonl", "*.json"
    for name in names:
        files = sorted(f for f in folder.glob(name) if f.name not in ABOUT_THE_DATA)
        if len(files) > 1:
            found = ", ".join(str(file.relative_to(folder)) for file in files[:4])
            raise DataError(f"{folder}: several files could be meant ({found}); name one of them")
        if files:
            return files
    raise DataError(
        f"{folder}: no Parquet, Arrow or JSON file in it; give a folder or file of the "
        "synthdog-en-detection data set or of one in the format of COCO detection"
    )
