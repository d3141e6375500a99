"""What heads kept, written down per request and rank and read back for the whole model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsemm_vllm.recording import KeptRecorder, load_kept

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


def test_request_ids_cannot_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    record(folder, "../outside[*]", 0, slice(0, 2), slice(0, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert load_kept(folder, "../outside[*]")


def test_nothing_recorded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no kept tokens of request b"):
        load_kept(tmp_path, "b")
