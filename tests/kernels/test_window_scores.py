"""Triton's window_scores against its twin, and against float64 where both round."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, FP8, TOLERANCE, Paged, bits, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import Prompts, PruneWorkspace, columns
from sparsemm_vllm.triton_kernels.reference import kept_tokens, read_tokens
from sparsemm_vllm.triton_kernels.window_scores import part_count, tiles, window_scores
from support.golden import Case, differs_by_ties_only

SCALE = 0.3  # not the default one; sharpens the softmax


@dataclass
class Step:
    """Prompts of `tokens` each, in a batch with a row before, between and after them."""

    tokens: list[int]
    window: int = 8
    kernel_size: int = 5
    Hkv: int = 2
    G: int = 4
    D: int = 32
    P: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        blocks = [x for n in self.tokens for x in (1, -(-n // self.P))] + [1]
        cache_dtype = self.cache_dtype or self.dtype
        paged = Paged.random(blocks, 2, self.Hkv, self.P, self.D, cache_dtype, self.seed)
        self.cache, self.block_table = paged.cache[1], paged.block_table
        self.poison_slots_past_the_end()
        # The chunk that ends a prompt holds its window queries and a few before; other rows decode.
        ends, T = [], 0
        for n in self.tokens:
            T += 1 + min(n, self.window + 3)
            ends.append(T)
        query = torch.randn(T + 1, self.Hkv * self.G + 1, 2 * self.D, generator=generator)
        kept = torch.zeros(len(query), dtype=torch.bool)
        for end in ends:
            kept[end - self.window : end] = True
        query[~kept] = torch.nan
        query[:, -1], query[..., self.D :] = torch.nan, torch.nan
        self.query = query.to(self.dtype).to(DEVICE)[:, :-1, : self.D]
        self.prompts = Prompts.pack(
            [(2 * i + 1, 7, ends[i], n) for i, n in enumerate(self.tokens)], 1, DEVICE
        )

    def poison_slots_past_the_end(self):
        """The last block's slots that no token of the prompt fills may hold anything."""
        for i, n in enumerate(self.tokens):
            if n % self.P:
                block = int(self.block_table[2 * i + 1, n // self.P])
                raw = self.cache[block, :, n % self.P :]
                raw.copy_(torch.full(raw.shape, torch.nan, device=DEVICE).to(raw.dtype))

    def workspace(self, extra: int = 0) -> PruneWorkspace:
        """Poisoned."""
        capacity = sum(map(columns, self.tokens)) + extra
        Hq = self.Hkv * self.G
        workspace = PruneWorkspace.allocate(capacity, Hq, self.Hkv, self.window, DEVICE)
        for buffer in (workspace.sums, workspace.scores, workspace.stats):
            buffer.fill_(torch.nan)
        return workspace

    def scores(self, op=window_scores, extra: int = 0, **kwargs) -> PruneWorkspace:
        workspace = self.workspace(extra)
        op(
            self.query,
            self.cache,
            self.block_table,
            self.prompts,
            workspace,
            self.window,
            self.kernel_size,
            SCALE,
            **kwargs,
        )
        return workspace

    def exact(self, k_scale: float = 1.0) -> list[torch.Tensor]:
        """Each prompt's scores in float64, ``[Hkv, n - W]``, straight from the formula."""
        W, results = self.window, []
        for row, _, end, n, _ in self.prompts.table.T.tolist():
            positions = torch.arange(n, device=DEVICE)
            kv = read_tokens(self.cache, self.block_table[row], positions, -(-n // self.P), 0)
            keys = kv[..., : self.D].double() * k_scale
            query = self.query[end - W : end].double().reshape(W, self.Hkv, self.G, self.D)
            logits = torch.einsum("whgd,hnd->hgwn", query, keys) * SCALE
            seen = positions[None] <= positions[n - W :, None]
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)[..., : n - W].mean((1, 2))
            half = self.kernel_size // 2
            padded = torch.nn.functional.pad(weights, (half, half))
            results.append(padded.unfold(1, self.kernel_size, 1).mean(-1) if n > W else weights)
        return results

    def largest_logit(self) -> float:
        """An upper bound: of the longest query and the longest key."""
        longest = (x.double().nan_to_num().norm(dim=-1).max() for x in (self.query, self.keys()))
        return SCALE * float(math.prod(longest))

    def keys(self) -> torch.Tensor:
        """All of the cache's."""
        return self.cache[..., : self.D]

    def check(self, k_scale: float | None = None, tolerance: float | None = None) -> None:
        """Every prompt's scores are right and every other column is as it was."""
        allowed = TOLERANCE[self.dtype] if tolerance is None else tolerance
        scale = None if k_scale is None else torch.tensor([k_scale], device=DEVICE)
        workspace = self.scores(extra=32, k_scale=scale)
        untouched = bits(torch.full_like(workspace.scores, torch.nan))
        exact = self.exact(k_scale or 1.0)
        offsets = self.prompts.table[4].tolist()
        for n, offset, expected in zip(self.tokens, offsets, exact, strict=True):
            own = slice(offset, offset + n - self.window)
            actual = workspace.scores[:, own]
            assert actual.isfinite().all(), f"n {n}"
            assert relative_error(actual, expected) <= allowed, f"n {n}"
            untouched[:, own] = bits(actual)
        assert torch.equal(bits(workspace.scores), untouched)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("G", "D", "P", "window"),
    [
        (1, 64, 16, 32),  # no groups: one tile of queries, no padding rows
        (4, 128, 16, 8),  # a tile exactly filled by several heads
        (
            7,
            80,
            8,
            10,
        ),  # 70 queries: a tile and a bit; D is no power of two; a page below 16 tokens
        (2, 32, 64, 2),  # 4 queries in a tile of 16
    ],
)
def test_scores(G, D, P, window, dtype):
    # A prime longer than a tile of tokens; the page's edges; shorter than a tile.
    tokens = [139, P * 2 - 1 + window, P * 2 + window, P * 2 + 1 + window, window + 3]
    Step(tokens, window, G=G, D=D, P=P, dtype=dtype).check()


def test_a_head_of_256():
    """Smaller tiles."""
    Step([131, 67], D=256, G=2, dtype=torch.bfloat16).check()


def test_a_window_of_64_and_a_group_of_16():
    """The most rows of queries: 16 tiles."""
    Step([197, 64], window=64, G=16, Hkv=1, D=16, dtype=torch.float16).check()


def test_the_twin():
    step = Step([61, 8, 9, 24], G=3)  # 8 = W, 9 = W + 1
    ours, theirs = step.scores().scores, step.scores(torch_ops.window_scores).scores
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert relative_error(ours.nan_to_num(0), theirs.nan_to_num(0)) < 1e-5


@pytest.mark.parametrize("window", [1, 63])
def test_windows_at_the_edge(window):
    Step([97, window, window + 1], window, G=3, dtype=torch.float16).check()


@pytest.mark.parametrize("kernel_size", [1, 3, 13])
def test_pooling(kernel_size):
    """13 is wider than the short prompts' 3 and 0 scores."""
    Step([101, 11, 8], G=1, kernel_size=kernel_size).check()


def test_a_cache_of_fp8():
    step = Step([281, 40], cache_dtype=FP8, dtype=torch.bfloat16)
    step.check(k_scale=0.7)


def test_a_scale_of_the_keys():
    Step([61], dtype=torch.float16).check(k_scale=2.5)


def test_prompts_of_very_unequal_lengths():
    """Most of the launch's programs have nothing to do for the short ones."""
    Step([8, 1031, 9, 25], G=1, Hkv=3, dtype=torch.float16).check()


def test_more_than_one_chunk_of_parts():
    """17 parts and more are merged in two rounds; the last ones are empty for the short prompt."""
    step = Step([401, 71], window=3, Hkv=1, G=2, D=16)
    rows = 2
    block_n = tiles(6, 16, torch.float32).block_n
    assert part_count(401, block_n, rows) > 16
    step.check()


@pytest.mark.parametrize("total", [1, 12])
def test_parts_of_several_tiles(total, monkeypatch):
    """One part of 9 tiles, or three of 3: the running maximum and sum; 16 queries end in the last.

    The logits differ by tens, so that the maximum changes between tiles.
    """
    monkeypatch.setattr(PruneWorkspace, "PARTS", total)
    step = Step([139, 24], window=16, G=1)
    step.query *= 5
    step.check()


def test_large_logits():
    """A softmax that needs its maximum: the logits differ by hundreds.

    A float32 sum of hundreds is rounded, in whatever order a processor adds, by so much that its
    exponential is off by as many times the float's precision.
    """
    step = Step([97], G=2)
    step.query *= 60
    largest = step.largest_logit()
    assert 300 < largest < 3000
    step.check(tolerance=torch.finfo(torch.float32).eps * largest)


def test_cached_values_are_not_read():
    step = Step([61])
    step.cache[..., step.D :] = torch.nan
    step.check()


def test_columns_decide_nothing():
    """The same scores, bit for bit, from a prompt's own columns wherever they lie."""
    one, two = Step([97], G=2), Step([97, 77], G=2)
    first = slice(0, 97 - one.window)
    two.query, two.cache, two.block_table = one.query, one.cache, one.block_table
    two.prompts.table[:, 1] = two.prompts.table[:, 0]
    two.prompts.table[4, 1] = columns(97)
    two.tokens = [97, 97]
    scores = two.scores().scores
    assert torch.equal(scores[:, first], scores[:, columns(97) :][:, first])
    assert relative_error(scores[:, first], one.exact()[0]) < 1e-5


@settings(max_examples=6)
@given(st.data())
def test_any_shape(data):
    window = data.draw(st.integers(1, 20))
    lengths = st.integers(window, window + 100)
    Step(
        data.draw(st.lists(lengths, min_size=1, max_size=2)),
        window,
        kernel_size=data.draw(st.sampled_from([1, 3, 5, 7])),
        Hkv=data.draw(st.integers(1, 2)),
        G=data.draw(st.integers(1, 8)),
        D=data.draw(st.sampled_from([16, 24, 32, 96])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),
        P=data.draw(st.sampled_from([4, 8, 16, 24, 128])),
        seed=data.draw(st.integers(0, 99)),
    ).check()


@pytest.mark.parametrize("number", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_published_kept_sets(number):
    case = Case(number)
    Hq, n, D = case.q.shape
    P, blocks = 16, -(-n // 16)
    paged = Paged.random([blocks], 1, case.Hkv, P, D)
    slots = torch.arange(n, device=DEVICE)
    block = paged.block_table[0, slots // P].long()
    paged.cache[0, block, :, slots % P, :D] = case.k.transpose(0, 1).to(DEVICE)
    workspace = PruneWorkspace.allocate(n, Hq, case.Hkv, case.window, DEVICE)
    prompts = Prompts.pack([(0, 0, n, n)], 1, DEVICE)
    query = case.q.transpose(0, 1).contiguous().to(DEVICE)
    window_scores(
        query,
        paged.cache[0],
        paged.block_table,
        prompts,
        workspace,
        case.window,
        case.pool_kernel,
        D**-0.5,
    )
    scores = workspace.scores[:, : n - case.window].cpu()
    window = set(range(n - case.window, n))
    for layer in range(2):
        capacities = torch.tensor(case.layout().capacities[layer])
        published = case.kept(layer)
        for head, mine in enumerate(kept_tokens(scores, capacities)):
            ours = set(mine.tolist()) | window
            assert differs_by_ties_only(ours, published[head], scores[head]), f"head {head}"
            np.testing.assert_array_equal(len(ours), len(published[head]))


class NoOperations(TorchDispatchMode):
    """Raises where torch would launch a kernel of its own, or wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} in a launcher")


def test_only_the_kernels_run(monkeypatch):
    """Nothing waits for the device: reading a value would be an operation too."""
    step = Step([61, 8])
    workspace, launched = step.workspace(), []
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: launched.append(self.fn))
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: launched.append(self.fn))
    with NoOperations():
        window_scores(
            step.query, step.cache, step.block_table, step.prompts, workspace, 8, 5, SCALE
        )
    names = [fn.__name__ for fn in launched]
    assert names == ["_window_stats", "_window_sums", "_pool"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": lambda s: s.query[0]}, "query"),
        ({"query": lambda s: s.query.transpose(1, 2).contiguous().mT}, "contiguous in D"),
        ({"query": lambda s: s.query.double()}, "float64"),
        ({"query": lambda s: s.query[..., :16]}, "2 \\* D"),
        ({"query": lambda s: s.query[:, :5]}, "Hq 5"),
        ({"layer_cache": lambda s: s.cache.half()}, "as the query"),
        ({"layer_cache": lambda s: s.cache.mT.contiguous().mT}, "last dimension"),
        ({"block_table": lambda s: s.block_table.long()}, "int64"),
        ({"block_table": lambda s: s.block_table.T.contiguous().T}, "contiguous"),
        ({"window": lambda s: 0}, "window is 0"),
        ({"window": lambda s: 65}, "window is 65"),
        ({"window": lambda s: 50}, "exceed"),
        ({"kernel_size": lambda s: 4}, "kernel_size is 4"),
        ({"k_scale": lambda s: torch.ones(2)}, "k_scale"),
        ({"prompts": lambda s: replace(s.prompts, table=s.prompts.table.T)}, "table"),
        (
            {"prompts": lambda s: replace(s.prompts, table=s.prompts.table.repeat(1, 33))},
            "33 prompts",
        ),
        ({"prompts": lambda s: replace(s.prompts, max_tokens=200)}, "200 tokens"),
        (
            {"workspace": lambda s: PruneWorkspace.allocate(64, 8, 1, 8, DEVICE)},
            "workspace.sums",
        ),
    ],
)
def test_refused(change, message):
    step = Step([61])
    arguments = {
        "query": step.query,
        "layer_cache": step.cache,
        "block_table": step.block_table,
        "prompts": step.prompts,
        "workspace": step.workspace(),
        "window": step.window,
        "kernel_size": 5,
        "scale": SCALE,
    }
    arguments |= {name: make(step) for name, make in change.items()}
    with pytest.raises(ValueError, match=message):
        window_scores(**arguments)
