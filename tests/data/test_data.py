"""Samples from every kind of file: what is read, what is skipped and counted, what is refused."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from sparsemm_vllm.data import DataError, load_samples
from sparsemm_vllm.data.bundled import MAX_WORDS, bundled_samples
from sparsemm_vllm.data.pictures import PICTURE_SIZE, PROFILE_SEEDS, make_sample

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


# The bundled generator.


def test_bundled_samples_are_those_of_the_profile_seeds():
    chosen = load_samples("ocr", 4, seed=7)
    expected = [make_sample(PROFILE_SEEDS[7 + i], ("read", "query")[i % 2]) for i in range(4)]
    assert [s.answer for s in chosen.samples] == [s.answer for s in expected]
    assert [s.image.tobytes() for s in chosen.samples] == [s.image.tobytes() for s in expected]
    assert (chosen.name, chosen.skipped) == ("ocr", {})


def test_the_hash_tells_samples_apart():
    hashes = [load_samples("ocr", n, s).hash for n, s in [(2, 0), (2, 0), (3, 0), (2, 1)]]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert all(len(text) == 64 for text in hashes)


@pytest.mark.parametrize("side", [PICTURE_SIZE + 1, 448, 672])
def test_pages_hold_different_words_inside_the_picture(side):
    for sample in bundled_samples(6, 11, side):
        assert sample.image.size == (side, side)
        texts = [word.text for word in sample.words]
        assert len(set(texts)) == len(texts)
        assert 3 <= len(texts) < MAX_WORDS + side / 40
        assert said(sample) == texts
        for word in sample.words:
            x0, y0, x1, y1 = word.box
            assert 0 <= x0 < x1 <= side
            assert 0 <= y0 < y1 <= side


def test_larger_pages_hold_more():
    few, many = (len(bundled_samples(1, 0, side)[0].words) for side in (300, 560))
    assert few * 2 < many


def test_the_source_says_how_large_pages_are():
    chosen = load_samples("ocr-448", 2, 3)
    assert chosen.name == "ocr-448"
    assert [s.answer for s in chosen.samples] == [s.answer for s in bundled_samples(2, 3, 448)]
    assert load_samples("ocr-224", 2, 3).hash == load_samples("ocr", 2, 3).hash


@pytest.mark.parametrize(
    ("source", "count", "seed", "reason"),
    [
        ("ocr", 0, 0, "at least 1, got 0"),
        ("ocr", -3, 0, "at least 1, got -3"),
        ("ocr", 2, -1, "seed must be"),
        ("ocr", 2, 10**9 - 1, "seed must be 0 to 999999998"),
        ("ocr-100", 1, 0, "at least 224 pixels"),
        ("ocr-100000", 1, 0, "at most 4096, got 100000"),
        ("ocr-large", 1, 0, "no such file"),
    ],
)
def test_drawn_pictures_that_cannot_be(source, count, seed, reason):
    with pytest.raises(DataError, match=reason):
        load_samples(source, count, seed)


# synthdog-en-detection.


@pytest.mark.parametrize("column", ["2_coord", "4_coord", "2_coord_norm", "4_coord_norm"])
@pytest.mark.parametrize("name", ["data.json", "train.jsonl"])
def test_synthdog(tmp_path, column, name):
    path = write_json(tmp_path, [synthdog_row(column=column)], name)
    chosen = load_samples(str(path), 5, 0)
    (sample,) = chosen.samples
    assert content(sample) == PAGE
    assert sample.answer == "some words 12.50 end"
    assert said(sample) == [text for text, _ in PAGE]
    assert sample.image.tobytes() == image(0).tobytes()
    assert (chosen.name, chosen.skipped) == ("synthdog-en-detection", {})


def test_boxes_are_the_pixels_that_corners_touch(tmp_path):
    words = [("a", (10.2, 20.9, 40.1, 30)), ("b", (-0.4, 0, 100.6, 80)), ("c", (99.5, 1, 99.6, 2))]
    path = write_json(tmp_path, [synthdog_row(words)])
    (sample,) = load_samples(str(path), 1, 0).samples
    assert [box for _, box in content(sample)] == [
        (10, 20, 41, 30),
        (0, 0, 100, 80),
        (99, 1, 100, 2),
    ]


def test_a_tilted_quad_gives_its_bounding_box(tmp_path):
    row = {"4_coord": [{"chunk": "a", "coord": [[20, 10], [60, 14], [58, 30], [18, 26]]}]}
    (sample,) = load_samples(str(write_json(tmp_path, [row])), 1, 0).samples
    assert content(sample) == [("a", (18, 10, 60, 30))]


@pytest.mark.parametrize(
    ("text", "coord", "reason"),
    [
        ("", [[1, 1], [9, 9]], "no text"),
        (" \n", [[1, 1], [9, 9]], "no text"),
        (None, [[1, 1], [9, 9]], "no text"),
        ("x", [[50, 50], [WIDTH + 2, 60]], "box outside the picture"),
        ("x", [[50, 50], [60, HEIGHT + 2]], "box outside the picture"),
        ("x", [[-2, 1], [9, 9]], "box outside the picture"),
        ("x", [[1, -2], [9, 9]], "box outside the picture"),
        ("x", [[5, 5], [5, 9]], "box without area"),
        ("x", [[WIDTH, 5], [WIDTH + 0.5, 9]], "box without area"),
        ("x", [[5, 5]], "box malformed"),
        ("x", [], "box malformed"),
        ("x", None, "box malformed"),
        ("x", [5, 5, 9, 9], "box malformed"),
        ("x", [["a", "b"], ["c", "d"]], "box malformed"),
        ("x", [[1, 2, 3], [4, 5, 6]], "box malformed"),
        ("x", [[float("nan"), 1], [9, 9]], "box malformed"),
        ("x", [[0, 0], [float("inf"), 9]], "box malformed"),
    ],
)
def test_words_that_cannot_be_used_are_counted(tmp_path, text, coord, reason):
    row = synthdog_row()
    row["2_coord"].insert(1, {"chunk": text, "coord": coord})
    chosen = load_samples(str(write_json(tmp_path, [row])), 1, 0)
    assert content(chosen.samples[0]) == PAGE
    assert chosen.skipped == {f"words: {reason}": 1}


def broken_rows(folder):
    (folder / "cut.png").write_bytes(png()[:-100])
    (folder / "text.png").write_text("no picture")
    return {
        "no image": synthdog_row() | {"image_name": None},
        "image file not found": synthdog_row() | {"image_name": "nowhere.png"},
        "image unreadable": synthdog_row() | {"image_name": "cut.png"},
        "image unreadable ": synthdog_row() | {"image_name": "text.png"},
        "image unreadable  ": synthdog_row() | {"image_name": "x" * 1000},
        "no words": {"2_coord": []},
        "annotations malformed": {"2_coord": "some words"},
        "no usable word": synthdog_row([("", (1, 1, 2, 2))]),
    }


def test_samples_that_cannot_be_used_are_counted(tmp_path):
    broken = broken_rows(tmp_path)
    path = write_json(tmp_path, [synthdog_row(), *broken.values()])
    chosen = load_samples(str(path), 9, 0)
    assert len(chosen.samples) == 1
    counts = {reason: n for reason, n in chosen.skipped.items() if reason.startswith("samples")}
    assert counts == {
        "samples: no image": 1,
        "samples: image file not found": 1,
        "samples: image unreadable": 3,
        "samples: no words": 1,
        "samples: annotations malformed": 1,
        "samples: no usable word": 1,
    }


def test_an_error_if_nothing_is_left_names_the_reasons(tmp_path):
    path = write_json(tmp_path, list(broken_rows(tmp_path).values()))
    message = refusal(path)
    assert str(path) in message
    assert "no usable sample among 8" in message
    assert "image unreadable (3)" in message


def test_the_seed_orders_and_the_count_limits(tmp_path):
    rows = [synthdog_row([(str(i), (1, 1, 9, 9))]) for i in range(30)]
    path = write_json(tmp_path, rows)
    first, again, other = (load_samples(str(path), 10, seed) for seed in (0, 0, 1))
    assert [s.answer for s in first.samples] == [s.answer for s in again.samples]
    assert first.hash == again.hash != other.hash
    assert len({s.answer for s in first.samples}) == 10
    assert {s.answer for s in first.samples} != {s.answer for s in other.samples}
    assert len(load_samples(str(path), 100, 0).samples) == 30


def test_the_hash_does_not_depend_on_where_the_files_lie(tmp_path):
    hashes = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = write_json(tmp_path / name, [synthdog_row(), synthdog_row()], f"{name}.json")
        hashes |= {load_samples(str(path), 2, 0).hash, load_samples(str(path.parent), 2, 0).hash}
    assert len(hashes) == 1
    changed = synthdog_row([("Some words", PAGE[0][1]), *PAGE[1:]])
    path = write_json(tmp_path, [changed, synthdog_row()])
    assert load_samples(str(path), 2, 0).hash not in hashes


def test_pictures_are_found_by_name_if_the_folder_was_moved(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "5.png").write_bytes(png())
    row = synthdog_row() | {"image_name": "/path/to/datasets/5.png"}
    assert load_samples(str(write_json(tmp_path, [row])), 1, 0).samples


def test_pictures_are_not_turned_by_their_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image().save(tmp_path / "turned.png", exif=exif)
    row = synthdog_row() | {"image_name": "turned.png"}
    (sample,) = load_samples(str(write_json(tmp_path, [row])), 1, 0).samples
    assert sample.image.size == (WIDTH, HEIGHT)
    assert not sample.image.getexif()


# COCO detection.


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


LARGEST_FIRST = [OBJECTS[1], OBJECTS[0], OBJECTS[2]]


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


# Arrow and Parquet.


def rows_with_bytes(count, row=synthdog_row):
    return [{"image": {"bytes": png(i), "path": None}} | row() for i in range(count)]


def test_parquet(tmp_path):
    rows = [row | synthdog_row([(str(i), PAGE[0][1])]) for i, row in enumerate(rows_with_bytes(12))]
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = pyarrow.Table.from_pylist(rows[part * 6 : part * 6 + 6])
        path = tmp_path / "data" / f"train-0000{part}-of-00002.parquet"
        parquet.write_table(table, path, row_group_size=4)
    chosen = load_samples(str(tmp_path), 12, 0)
    assert {s.answer: s.image.tobytes() for s in chosen.samples} == {
        str(i): image(i).tobytes() for i in range(12)
    }
    assert len(load_samples(str(path), 12, 0).samples) == 6


WATCHED = """
import sys

def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(watch)

from sparsemm_vllm.data import load_samples

print(len(load_samples(sys.argv[1], 2, 0).samples))
"""


def detection_data(count: int) -> datasets.Dataset:
    """Rows with pictures and numbered classes, described as `datasets` does it."""
    names = ["bus", "cat", "dog", "hot dog"]
    objects = {
        "bbox_id": datasets.Value("int64"),
        "category": datasets.ClassLabel(names=names),
        "bbox": datasets.List(datasets.Value("float64"), length=4),
        "area": datasets.Value("float64"),
    }
    columns = {name: datasets.List(feature) for name, feature in objects.items()}
    features = datasets.Features({"image": datasets.Image(), "objects": columns})
    row = detection_row(names=names)
    return datasets.Dataset.from_list([{"image": image(i)} | row for i in range(count)], features)


def test_a_folder_that_datasets_saved(tmp_path):
    data = detection_data(3)
    datasets.DatasetDict({"val": data}).save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "saved.parquet")
    for source in (tmp_path / "saved", tmp_path / "saved" / "val", tmp_path / "saved.parquet"):
        chosen = load_samples(str(source), 3, 0)
        assert {s.image.tobytes() for s in chosen.samples} == {image(i).tobytes() for i in range(3)}
        assert content(chosen.samples[0]) == LARGEST_FIRST


def test_splits_that_datasets_saved_are_one_table(tmp_path):
    halves = detection_data(5).train_test_split(2, shuffle=False)
    halves.save_to_disk(tmp_path)
    assert len(load_samples(str(tmp_path), 9, 0).samples) == 5


def test_classes_of_a_list_of_objects_have_names(tmp_path):
    label = datasets.ClassLabel(names=["cat", "dog"])
    box = datasets.List(datasets.Value("float64"))
    objects = datasets.List({"category": label, "bbox": box})
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    row = {"image": image(), "objects": [{"category": "dog", "bbox": [1.0, 2.0, 3.0, 4.0]}]}
    datasets.Dataset.from_list([row], features).to_parquet(tmp_path / "a.parquet")
    (sample,) = load_samples(str(tmp_path), 1, 0).samples
    assert content(sample) == [("dog", (1, 2, 4, 6))]


def test_broken_parquet_is_one_error(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1" + bytes(100))
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("missing", "source"),
    [("datasets", "saved"), ("datasets", "saved.parquet"), ("pyarrow.parquet", "saved.parquet")],
)
def test_without_a_package_the_error_names_it(tmp_path, monkeypatch, missing, source):
    data = detection_data(1)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "saved.parquet")
    monkeypatch.setitem(sys.modules, missing, None)
    message = refusal(tmp_path / source)
    assert message.startswith(f"{tmp_path / source}: cannot be read: import of {missing} halted")
    assert message.endswith("pip install datasets (it brings pyarrow)")


def test_reading_fetches_nothing_and_writes_nothing(tmp_path):
    data = detection_data(2)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "saved.parquet")
    home = {name: str(tmp_path / "home") for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    before = sorted(tmp_path.rglob("*"))
    for source in ("saved", "saved.parquet"):
        command = [sys.executable, "-c", WATCHED, str(tmp_path / source)]
        run = subprocess.run(command, env=os.environ | home, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr
    assert sorted(tmp_path.rglob("*")) == before


# What is not a data set.


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no Parquet, Arrow or JSON file in it"),
        ({"state.json": "{}"}, "no Parquet, Arrow or JSON file in it"),
        ({"a.json": "[]", "b.json": "[]"}, "several files could be meant (a.json, b.json)"),
        ({"a.json": "[]"}, "its columns: none"),
        ({"a.json": "[1, 2]"}, "neither a list of records nor COCO annotations"),
        ({"a.json": '{"images": []}'}, "neither a list of records nor COCO annotations"),
        ({"a.json": "[{"}, "not JSON"),
        ({"a.jsonl": '{"x": 1}\n{'}, "not JSON"),
        ({"a.json": '[{"image": "x.png", "text": "?"}]'}, "its columns: image, text"),
        ({"a.json": '[{"2_coord": []}]'}, "no row has a picture"),
        ({"a.json": '[{"objects": []}]'}, "no row has a picture"),
        (
            {"a.json": '{"images": [{"id": 1}], "annotations": [], "categories": []}'},
            "malformed COCO annotations: KeyError('file_name')",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folders_that_are_no_data_set(tmp_path, files, reason):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path))
    assert reason in message


def test_files_that_are_no_data_set(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "latin.json").write_bytes(b'["\xe4"]')
    assert "not a .parquet, .arrow, .json or .jsonl file" in refusal(tmp_path / "data.csv")
    assert "not JSON" in refusal(tmp_path / "latin.json")
    assert "no such file or folder; give 'ocr'" in refusal(tmp_path / "nowhere")
    assert "~nobody-of-that-name" in refusal("~nobody-of-that-name/data")
    assert "give 'ocr' or" in refusal("OCR")
