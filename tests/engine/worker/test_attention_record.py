"""Which queries of a step are recorded, and where."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE

from sparsemm_vllm.engine.worker.probes.attention import AttentionRecorder
from sparsemm_vllm.triton_kernels.batch import QueryTiles

L, HQ, ROWS = 2, 6, 50


def recorder(G: int = 2) -> AttentionRecorder:
    return AttentionRecorder(L, HQ, G, max_rows=16, rows=ROWS, max_requests=4, device=DEVICE)


def tiles(recorder: AttentionRecorder, *rows: tuple[int, int, int]) -> QueryTiles | None:
    """Of a step of ``(request, tokens before it, tokens in it)``."""
    requests, computed, queries = (np.array(column) for column in zip(*rows, strict=True))
    starts = np.concatenate([[0], np.cumsum(queries)])
    return recorder.tiles(requests, starts, computed + queries)


def queries(found: QueryTiles | None) -> list[tuple[int, int, int, int]]:
    """Each recorded query: batch row, index in the step, position, row of the buffer."""
    assert found is not None
    return [
        (row, first + i, position + i, target + i)
        for row, first, count, position, target in found.table.tolist()
        for i in range(count)
    ]


@pytest.mark.parametrize("chunks", [[20], [13, 7], [16, 4], [17, 3], [19, 1], [5] * 4])
def test_chunks_record_what_one_prefill_does(chunks: list[int]) -> None:
    """Four queries of a prompt of 20: the first of them in any chunk, at any place of it."""
    each = recorder()
    each.add(1, 20, [30, 4])
    computed, found = 0, []
    for chunk in chunks:
        step = tiles(each, (0, 3, 5), (1, computed, chunk))
        if computed + chunk <= 16:
            assert step is None
        else:
            found += [(position, target) for _, _, position, target in queries(step)]
            assert all(first == 5 + position - computed for _, first, position, _ in queries(step))
        computed += chunk
    assert found == [(16, 30), (17, 31), (18, 32), (19, 33)]


def test_generated_tokens_follow() -> None:
    each = recorder()
    each.add(0, 10, [0, 1])
    each.add(2, 10, [5, 2])
    assert queries(tiles(each, (0, 12, 1), (2, 10, 1))) == [(0, 0, 12, 3), (1, 1, 10, 7)]


def test_long_spans_are_cut_into_tiles() -> None:
    each = recorder()
    each.add(0, 40, [2, 37])
    step = tiles(each, (0, 0, 40))
    assert step is not None
    assert step.block_q == 8, "16 rows hold 8 queries of 2 heads"
    assert step.count == 5
    assert queries(step) == [(0, 3 + i, 3 + i, 2 + i) for i in range(37)]


def test_an_index_that_is_used_again_forgets_its_last_request() -> None:
    each = recorder()
    each.add(0, 10, [0, 10])
    each.add(0, 10, None)
    assert tiles(each, (0, 0, 10)) is None


def test_rows_past_the_buffer_are_not_recorded() -> None:
    each = recorder()
    each.add(0, 10, [ROWS - 2, 1])
    assert queries(tiles(each, (0, 9, 1))) == [(0, 0, 9, ROWS - 2)]
    assert queries(tiles(each, (0, 10, 1))) == [(0, 0, 10, ROWS - 1)]
    assert tiles(each, (0, 11, 1)) is None


@pytest.mark.parametrize("wanted", [[0, 0], [0, 11], [-1, 5], [ROWS - 4, 5]])
def test_queries_and_rows_that_do_not_exist(wanted: list[int]) -> None:
    with pytest.raises(ValueError, match=r"of 10, from row"):
        recorder().add(0, 10, wanted)


def test_what_was_read_is_forgotten() -> None:
    each = recorder()
    each.keys[:, 3] = torch.arange(HQ, dtype=torch.int32)
    each.keys[:, 7] = 9
    read = np.frombuffer(each.read(5), dtype=np.int32).reshape(L, 5, HQ)
    np.testing.assert_array_equal(read[1, 3], np.arange(HQ))
    assert (read[:, [0, 1, 2, 4]] == -1).all()
    assert (each.keys[:, :5] == -1).all()
    assert (each.keys[:, 7] == 9).all()
