"""Samples' pictures and annotations, and files that hold them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsemm_vllm.data import DataError, load_samples

WIDTH, HEIGHT = 100, 80
PAGE = [("some words", (10, 20, 40, 30)), ("12.50", (50, 20, 80, 30)), ("end", (10, 60, 99, 80))]
OBJECTS = [("cat", (0, 0, 30, 30)), ("hot dog", (20, 20, 90, 70)), ("dog", (60, 60, 70, 75))]


def image(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def corners(box, quad=False, norm=False):
    x0, y0, x1, y1 = box
    points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)] if quad else [(x0, y0), (x1, y1)]
    scale = (WIDTH, HEIGHT) if norm else (1, 1)
    return [[x / scale[0], y / scale[1]] for x, y in points]


def synthdog_row(words=PAGE, column="2_coord"):
    quad, norm = column.startswith("4"), column.endswith("norm")
    return {column: [{"chunk": text, "coord": corners(box, quad, norm)} for text, box in words]}


def detection_row(objects=OBJECTS, names=None):
    """As huggingface.co/detection-datasets has it: columns of objects, boxes of two corners."""
    return {
        "objects": {
            "bbox_id": list(range(len(objects))),
            "category": [names.index(name) if names else name for name, _ in objects],
            "bbox": [[float(edge) for edge in box] for _, box in objects],
            "area": [1.0] * len(objects),
        }
    }


def write_json(folder: Path, rows, name="data.json", count=None) -> Path:
    """Rows with a picture each, beside the file."""
    for i, row in enumerate(rows):
        (folder / f"{i}.png").write_bytes(png(i))
        row.setdefault("image_name", f"{i}.png")
    path = folder / name
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if name.endswith("jsonl") else f"[{','.join(lines)}]")
    return path


def content(sample):
    return [(word.text, word.box) for word in sample.words]


def said(sample):
    return [sample.answer[start:end] for start, end in sample.answer_spans]


def refusal(source, count=5, seed=0):
    with pytest.raises(DataError) as error:
        load_samples(str(source), count, seed)
    message = str(error.value)
    assert message.isprintable(), "one line"
    return message


LARGEST_FIRST = [OBJECTS[1], OBJECTS[0], OBJECTS[2]]
