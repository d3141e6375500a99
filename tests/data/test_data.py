"""Samples from every kind of file: what is read, what is skipped and counted, what is refused."""

import pytest
from PIL import Image

from sparsemm_vllm.data import load_samples
from support.samples import (
    HEIGHT,
    PAGE,
    WIDTH,
    content,
    image,
    png,
    refusal,
    said,
    synthdog_row,
    write_json,
)

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
