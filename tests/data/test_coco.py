"""Pictures with objects: COCO's own files and rows of other data sets."""

import json
from pathlib import Path

import pytest

from sparsemm_vllm.data import load_samples
from support.samples import (
    LARGEST_FIRST,
    OBJECTS,
    content,
    detection_row,
    png,
    refusal,
    said,
    write_json,
)


def coco_annotations(folder: Path, objects=OBJECTS) -> Path:
    """COCO's own layout: annotations/instances_SPLIT.json and a folder of pictures a split."""
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    (folder / "val2017" / "000007.png").write_bytes(png())
    names = sorted({name for name, _ in objects})
    annotations = [
        {
            "image_id": 7,
            "category_id": 10 + names.index(name),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "iscrowd": int(name == "crowd"),
        }
        for name, (x0, y0, x1, y1) in objects
    ]
    path = folder / "annotations" / "instances_val2017.json"
    about = {
        "images": [{"id": 7, "file_name": "000007.png"}],
        "annotations": annotations,
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)],
    }
    path.write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("layout", ["annotations", "detection", "objects", "sparsemm"])
def test_coco(tmp_path, layout):
    if layout == "annotations":
        path = coco_annotations(tmp_path)
    elif layout == "objects":  # the convention of huggingface.co/docs/datasets/object_detection
        objects = [
            {"category": name, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            for name, (x0, y0, x1, y1) in OBJECTS
        ]
        path = write_json(tmp_path, [{"objects": objects}], "metadata.jsonl")
    else:
        row = detection_row()
        path = write_json(tmp_path, [{"content": row["objects"]} if layout == "sparsemm" else row])
    chosen = load_samples(str(path), 5, 0)
    (sample,) = chosen.samples
    assert content(sample) == LARGEST_FIRST
    assert sample.answer == "hot dog, cat, dog"
    assert said(sample) == ["hot dog", "cat", "dog"]
    assert "objects" in sample.question
    assert (chosen.name, chosen.skipped) == ("coco-detection", {})


def test_the_folder_of_coco_is_enough(tmp_path):
    path = coco_annotations(tmp_path)
    assert load_samples(str(tmp_path), 1, 0).hash == load_samples(str(path), 1, 0).hash


def test_objects_whose_name_occurs_again_are_no_words(tmp_path):
    objects = [*OBJECTS, ("cat", (50, 0, 60, 10)), ("crowd", (0, 0, 100, 10))]
    (sample,) = load_samples(str(coco_annotations(tmp_path, objects)), 1, 0).samples
    assert [word.text for word in sample.words] == ["hot dog", "dog"]


def test_a_picture_of_many_cats_is_skipped(tmp_path):
    rows = [detection_row(), detection_row([("cat", (0, 0, 9, 9)), ("cat", (9, 9, 20, 20))])]
    chosen = load_samples(str(write_json(tmp_path, rows)), 2, 0)
    assert len(chosen.samples) == 1
    assert chosen.skipped == {"samples: no object whose name occurs once": 1}


def test_objects_that_cannot_be_used_are_counted(tmp_path):
    objects = [*OBJECTS, ("bus", (90, 70, 110, 75)), (None, (0, 0, 5, 5))]
    chosen = load_samples(str(write_json(tmp_path, [detection_row(objects)])), 2, 0)
    assert content(chosen.samples[0]) == LARGEST_FIRST
    assert chosen.skipped == {"words: box outside the picture": 1, "words: no text": 1}


def test_numbered_categories_without_names_are_refused(tmp_path):
    path = write_json(tmp_path, [detection_row([(3, (0, 0, 9, 9))])])
    assert "objects have numbers for categories" in refusal(path)
