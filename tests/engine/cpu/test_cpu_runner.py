"""The runner's kernels in torch against vLLM's own, interpreted."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsemm_vllm import environment
from sparsemm_vllm.engine.cpu import model_runner as cpu_runner
from sparsemm_vllm.engine.vllm_api import contract

if environment.has_gpu():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

REQUESTS = torch.tensor([3, 0, 4], dtype=torch.int32)
LENGTHS = torch.tensor([5, 1, 17], dtype=torch.int32)
STARTS = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
COMPUTED = torch.tensor([20, 7, 7, 0, 15], dtype=torch.int32)  # of requests 0 to 4
PREFILL = torch.tensor([20, 9, 9, 5, 40], dtype=torch.int32)  # the first decodes, others prefill
MAX_TOKENS = 40


def pair(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The twin in place and vLLM's function."""
    cpu_runner.install()
    (wrap,) = (t for t in cpu_runner.TWINS if t.symbol.endswith(name))
    assert wrap.is_installed(), f"vLLM's {name} has other parameters"
    holder, attribute = contract.resolve(wrap.symbol)
    twin = getattr(holder, attribute)
    return twin, twin.__wrapped__


def assert_equal_effects(name: str, *arguments: Any, **options: Any) -> Any:
    """Both return and write the same."""
    results = []
    for function in pair(name):
        own = copy.deepcopy((arguments, options))
        results.append((function(*own[0], **own[1]), own))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    return results[0][0]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tables of two groups, every entry another block, in plain tensors in place of vLLM's own."""
    from vllm.v1.worker.gpu import block_table

    def tensor(size: tuple[int, int], dtype: torch.dtype, device: Any = None) -> Any:
        return SimpleNamespace(gpu=torch.arange(size[0] * size[1], dtype=dtype).view(size))

    monkeypatch.setattr(block_table, "StagedWriteTensor", tensor)
    monkeypatch.setattr(block_table, "UvaBackedTensor", tensor)
    monkeypatch.setattr(block_table, "FusedStagedWriter", lambda *_: None)
    made = block_table.BlockTables([16, 4], 5, MAX_TOKENS, [9, 30], torch.device("cpu"))
    for group, table in enumerate(made.block_tables):
        made.num_blocks.gpu[group] = table.gpu.shape[1]
    return made


def test_gather_block_tables(tables: Any) -> None:
    twin, original = pair("gather_block_tables")
    expected = [table.clone() for table in original(tables, REQUESTS, 5)]
    for table in tables.input_block_tables:
        table.fill_(-7)
    for ours, theirs in zip(twin(tables, REQUESTS, 5), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_fewer_requests_leave_no_rows_behind(tables: Any) -> None:
    """What a larger batch left in the shared tables, a smaller one clears, padded or not."""
    if not hasattr(tables, "_num_dirty_rows"):
        pytest.skip("vLLM 0.32 clears padded rows only")
    twin, original = pair("gather_block_tables")
    for function in (twin, original):
        for table in tables.input_block_tables:
            table.fill_(-7)
        tables._num_dirty_rows = 5
        function(tables, REQUESTS[:1], 2)
        assert [int((table[1:] == 0).all()) for table in tables.input_block_tables] == [1, 1]
        assert tables._num_dirty_rows == 1


def test_blocks_that_no_query_sees_are_null(tables: Any) -> None:
    """0.33: those that a sliding window has passed, which may be another request's by now."""
    if not hasattr(tables, "sliding_window_reach"):
        pytest.skip("vLLM 0.32 gives sliding layers their whole table")
    tables.sliding_window_reach[1] = 7
    tables.has_sliding_window_groups = True
    twin, original = pair("gather_block_tables")
    expected = [t.clone() for t in original(tables, REQUESTS, 5, num_computed_tokens=COMPUTED)]
    assert (expected[1][1] == 0).sum() == (20 - 7) // 4, "what a window of 8 has passed"
    for table in tables.input_block_tables:
        table.fill_(-7)
    for ours, theirs in zip(
        twin(tables, REQUESTS, 5, num_computed_tokens=COMPUTED), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("requests", [REQUESTS, torch.tensor([3, -1, 4], dtype=torch.int32)])
def test_slot_mappings(tables: Any, requests: torch.Tensor, enabled: bool) -> None:
    tables.slot_mapping_enabled[1] = enabled
    positions = torch.cat([torch.arange(5), torch.tensor([20]), torch.arange(15, 32)])
    twin, original = pair("compute_slot_mappings")
    results = []
    for function in (twin, original):
        out = torch.full((2, MAX_TOKENS), 77)
        results.append((function(tables, requests, STARTS, positions, 30, out=out), out))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0][0].shape == (2, 30)


def test_positions() -> None:
    arguments = torch.full((MAX_TOKENS,), -5), torch.full((5,), -5, dtype=torch.int32)
    assert_equal_effects("prepare_pos_seq_lens", REQUESTS, STARTS, COMPUTED, *arguments)


@pytest.mark.parametrize("drafts", [0, 2])
def test_sampled_tokens(drafts: int) -> None:
    logits = torch.tensor([1, 1 + drafts, 1])
    assert_equal_effects(
        "combine_sampled_and_draft_tokens",
        torch.zeros(MAX_TOKENS, dtype=torch.int32),
        REQUESTS,
        torch.tensor([[11], [12], [13], [14], [15]]),
        STARTS if not drafts else torch.tensor([0, 5, 8, 25], dtype=torch.int32),
        COMPUTED[REQUESTS.long()] + LENGTHS,
        PREFILL,
        torch.arange(10).view(5, 2) + 90,
        torch.cat([torch.zeros(1, dtype=torch.int64), logits.cumsum(0)]).int(),
        int(logits.sum()),
    )


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("rejected", [0, 1])
def test_update(counted: bool, rejected: int) -> None:
    assert_equal_effects(
        "post_update",
        REQUESTS,
        COMPUTED,
        torch.zeros(5, 1, dtype=torch.int64),
        torch.zeros(5, 50, dtype=torch.int32) if counted else None,
        torch.tensor([[41], [42], [43]]) if not rejected else torch.arange(6).view(3, 2),
        torch.tensor([0, 1, 1], dtype=torch.int32),
        torch.tensor([0, rejected, 0], dtype=torch.int32),
        STARTS,
        torch.zeros(5, 64, dtype=torch.int32),
        torch.tensor([21, 9, 9, 5, 32], dtype=torch.int32),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling(temperature: float) -> None:
    """One request that samples at random takes the whole batch to vLLM's function."""
    generator = torch.Generator().manual_seed(0)
    sampled = assert_equal_effects(
        "gumbel_sample",
        torch.randn(3, 2000, generator=generator),
        REQUESTS,
        torch.tensor([0.0, 9.0, 9.0, 0.0, temperature]),
        torch.arange(5),
        torch.tensor([4, 20, 31]),
        apply_temperature=False,
        is_drafting=False,
    )
    assert sampled.dtype == torch.int64


@pytest.mark.parametrize(
    ("k", "p", "kept"),
    [
        ([2, 4], None, [[3, 2], [3, 2, 1, 0]]),
        (None, [0.6, 0.85], [[3], [3, 2]]),  # the softmax: 0.64, 0.24, 0.09, 0.03
        ([1, 3], [0.85, 1.0], [[3], [3, 2, 1]]),
    ],
    ids=["top k", "top p", "both"],
)
def test_top_k_top_p(k: list[int] | None, p: list[float] | None, kept: list[list[int]]) -> None:
    """vLLM's own kernel cannot be compared: it fails in the interpreter."""
    logits = torch.arange(4.0).repeat(2, 1)
    top_k = None if k is None else torch.tensor(k, dtype=torch.int32)
    twin, _ = pair("apply_top_k_top_p_triton")
    masked = twin(logits.clone(), top_k, None if p is None else torch.tensor(p))
    for row, tokens in enumerate(kept):
        assert set(masked[row].isfinite().nonzero().flatten().tolist()) == set(tokens)
        torch.testing.assert_close(masked[row, tokens], logits[row, tokens], rtol=0, atol=0)


def test_another_vllm_keeps_its_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins replace only functions that are as in a release that SPARSEMM supports."""
    assert all(contract.is_recorded(twin.symbol) for twin in cpu_runner.TWINS)
    assert not contract.is_recorded("vllm.v1:gone")
    from vllm.v1.worker.gpu import model_runner

    def prepare_pos_seq_lens(idx_mapping, query_start_loc, computed, pos, seq_lens, planted=None):
        raise AssertionError("never called")

    monkeypatch.setattr(model_runner, "prepare_pos_seq_lens", prepare_pos_seq_lens)
    cpu_runner.install()
    assert model_runner.prepare_pos_seq_lens is prepare_pos_seq_lens
