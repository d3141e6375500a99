"""Arrow and Parquet files, which `datasets` writes and reads."""

import os
import subprocess
import sys

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from sparsemm_vllm.data import load_samples
from support.samples import (
    LARGEST_FIRST,
    PAGE,
    content,
    detection_row,
    image,
    png,
    refusal,
    synthdog_row,
)


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
