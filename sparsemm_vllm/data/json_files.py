"""Rows of JSON and JSON Lines files, and of COCO's annotation files.

They are not read by `datasets`: it makes dates of words that look like dates, its errors do not
name the file, and it knows no COCO annotations.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from sparsemm_vllm.data.rows import Row, Table
from sparsemm_vllm.data.samples import DataError

COCO_KEYS = ("images", "annotations", "categories")


def json_table(path: Path) -> Table:
    """A list of records, one record a line, or COCO's ``instances_*.json``.

    Pictures are looked for beside the file, in ``images`` and ``data`` there, and for COCO in the
    folder that is named like the split.

    Raises:
        DataError: if it is none of these.
    """
    content = _parse(path)
    if isinstance(content, dict) and set(COCO_KEYS) <= set(content):
        rows = _coco_rows(path, content)
    elif isinstance(content, list) and all(isinstance(row, dict) for row in content):
        rows = content
    else:
        raise DataError(
            f"{path}: neither a list of records nor COCO annotations ({', '.join(COCO_KEYS)})"
        )
    columns = frozenset(name for row in rows for name in row)
    return Table(path, len(rows), columns, rows.__getitem__, _folders(path))


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
        raise DataError(f"{path}: not JSON: {error}") from None


def _folders(path: Path) -> tuple[Path, ...]:
    split = path.stem.rpartition("_")[2]
    roots = path.parent, path.parent.parent
    inner = "", "images", "data", split, f"images/{split}"
    return tuple(root / name for root in roots for name in inner)


def _coco_rows(path: Path, content: dict[str, Any]) -> list[Row]:
    """One row per picture, its objects by name."""
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects: dict[Any, list[Row]] = defaultdict(list)
        for annotation in content["annotations"]:
            objects[annotation["image_id"]].append(
                {
                    "category": names.get(annotation["category_id"]),
                    "bbox": annotation["bbox"],
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
        return [
            {"file_name": image["file_name"], "objects": objects[image["id"]]}
            for image in content["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: malformed COCO annotations: {error!r}") from None
