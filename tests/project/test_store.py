"""What is kept piece by piece: whole files, of equal settings only."""

import json
from pathlib import Path

import pytest

from sparsemm_vllm.files import write_json, write_whole
from sparsemm_vllm.store import DamagedError, OtherSettingsError, json_store

SETTINGS = {"model": "a", "sizes": (1, 2)}


def test_nothing_is_there_at_first(tmp_path: Path) -> None:
    assert json_store(tmp_path / "s.json", SETTINGS).load() is None


def test_what_is_saved_is_loaded_by_the_next_call(tmp_path: Path) -> None:
    """With its settings at the front, of which a tuple comes back as a list."""
    json_store(tmp_path / "s.json", SETTINGS).save({"cells": {"first": 1}})
    again = json_store(tmp_path / "s.json", SETTINGS)
    found = again.load()
    assert found == {"model": "a", "sizes": [1, 2], "cells": {"first": 1}}
    again.save(found | {"cells": {"first": 1, "second": 2}})
    assert list(json.loads((tmp_path / "s.json").read_text())["cells"]) == ["first", "second"]
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    json_store(tmp_path / "s.json", SETTINGS).save({})
    before = (tmp_path / "s.json").read_bytes()
    with pytest.raises(OtherSettingsError, match=r"another sizes: \[1, 2\], not \[1, 3\]") as error:
        json_store(tmp_path / "s.json", SETTINGS | {"sizes": (1, 3)}).load()
    assert (error.value.name, error.value.found, error.value.wanted) == ("sizes", [1, 2], [1, 3])
    assert (tmp_path / "s.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model": "a"}'])
def test_a_damaged_file_is_no_store(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(DamagedError):
        json_store(tmp_path / "s.json", SETTINGS).load()


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_that_is_not_durable_is_whole_too(tmp_path: Path, durable: bool) -> None:
    """A link is followed, and nothing stays beside the file."""
    write_json(tmp_path / "file", {"before": 1})
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", "é", durable)
    assert (tmp_path / "file").read_bytes() == "é".encode()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]
