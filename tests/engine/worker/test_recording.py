"""What heads kept, written down per request and rank and read back for the whole model."""

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsemm_vllm.engine.worker.probes.kept import KeptRecorder, load_kept

N = 50
LENGTHS = torch.tensor([[3, 0], [1, 4]])  # [layers, heads]: unequal, one of them empty


def record(folder: Path, request_id: str, offset: int, layers: slice, heads: slice) -> None:
    recorder = KeptRecorder(folder, (layers, heads))
    for layer in range(layers.start, layers.stop):
        lengths = LENGTHS[layer, heads]
        positions = torch.full((len(lengths), 4), N)
        for head, length in enumerate(lengths.tolist()):
            positions[head, :length] = torch.arange(length) + offset
        recorder.add(request_id, positions, lengths, N)


def test_ranks_are_put_together(tmp_path: Path) -> None:
    record(tmp_path, "a", 5, slice(0, 2), slice(0, 1))
    record(tmp_path, "a", 5, slice(0, 2), slice(1, 2))
    kept = load_kept(tmp_path, "a")
    assert set(kept) == set(np.ndindex(2, 2))
    for head, positions in kept.items():
        np.testing.assert_array_equal(positions, np.arange(int(LENGTHS[head])) + 5)


def test_what_is_recorded_outlives_the_workspace(tmp_path: Path) -> None:
    """The next layer's positions are written over those of the last one."""
    recorder = KeptRecorder(tmp_path, (slice(0, 2), slice(0, 2)))
    workspace = torch.empty(2, 4, dtype=torch.int32)
    for layer in range(2):
        workspace.copy_(torch.arange(4) + 10 * layer)
        recorder.add("a", workspace, LENGTHS[layer], N)
        workspace.fill_(-1)
    kept = load_kept(tmp_path, "a")
    assert [kept[head].tolist() for head in np.ndindex(2, 2)] == [
        [0, 1, 2],
        [],
        [10],
        [10, 11, 12, 13],
    ]


def test_requests_whose_names_begin_alike(tmp_path: Path) -> None:
    everything = slice(0, 2), slice(0, 2)
    for offset, name in enumerate(["request-1", "request-10", "request-1-0123abcd-89abcdef"]):
        record(tmp_path, name, offset, *everything)
    assert load_kept(tmp_path, "request-1")[0, 0][0] == 0
    assert load_kept(tmp_path, "request-10")[0, 0][0] == 1
    assert load_kept(tmp_path, "request-1-0123abcd")[0, 0][0] == 2, "vLLM appends eight digits"


@pytest.mark.parametrize("suffix", ["", "-0123abcd"], ids=["as it is", "with vLLM's digits"])
def test_any_request_id_is_recorded(tmp_path: Path, suffix: str) -> None:
    """`X-Request-Id` is the client's: it may be no file name, or the same but for its case."""
    folder = tmp_path / "kept"
    names = [
        "x" * 300,
        "../outside[*]",
        "/etc/passwd",
        "a\0b",
        "a\0",
        "é\n",
        "A",
        "a",
        "",
        "-",
        ".",
    ]
    for offset, name in enumerate(names):
        record(folder, name + suffix, offset, slice(0, 2), slice(0, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    for offset, name in enumerate(names):
        for known_as in {name, name + suffix}:
            assert load_kept(folder, known_as)[0, 0][0] == offset, known_as
    stored = set()
    for file in folder.iterdir():
        assert file.name == file.name.lower()
        with np.load(file) as data:
            stored.add(data["request_id"].tobytes().decode())
    assert stored == {name + suffix for name in names}


def test_of_two_requests_with_one_id_the_last_is_found(tmp_path: Path) -> None:
    """Not heads of both."""
    record(tmp_path, "a-ffffffff", 0, slice(0, 2), slice(0, 2))
    for file in tmp_path.iterdir():
        os.utime(file, (1, 1))
    record(tmp_path, "a-00000000", 1, slice(0, 2), slice(0, 1))
    kept = load_kept(tmp_path, "a")
    assert set(kept) == {(0, 0), (1, 0)}
    assert kept[0, 0][0] == 1
    assert load_kept(tmp_path, "a-ffffffff")[0, 0][0] == 0


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_loses_the_record_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = KeptRecorder(tmp_path, (slice(0, 1), slice(0, 2)))
    positions = torch.arange(4).expand(2, 4)
    # Only from there: vLLM's own logger may pass records on, or not, by what was imported before.
    ours = logging.getLogger("vllm.sparsemm.recording")
    monkeypatch.setattr(ours, "propagate", False)
    monkeypatch.setattr(ours, "handlers", [caplog.handler])
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_space)
        for i in range(9):
            recorder.add(f"lost-{i}", positions, LENGTHS[0], N)
    assert recorder.lost == 9
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]
    assert "'lost-0', 1 so far" in caplog.text
    assert not list(tmp_path.iterdir()), "half of a file is left"
    recorder.add("kept", positions, LENGTHS[0], N)
    assert load_kept(tmp_path, "kept")[0, 0].tolist() == [0, 1, 2]

    tmp_path.rename(tmp_path.with_name("removed"))
    for i in range(2):
        recorder.add(f"gone-{i}", positions, LENGTHS[0], N)
    assert recorder.lost == 11
    assert len(caplog.records) == 2, "another reason, which is the tenth too"
    assert "'gone-0', 10 so far" in caplog.text
    assert "No such file" in caplog.text


def test_nothing_recorded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no kept tokens of request b"):
        load_kept(tmp_path, "b")
