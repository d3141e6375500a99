"""Chunk ends and prefix hits; test_simulation.py has them in vLLM's engine core."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.scheduler.chunks import prefix_hit_limit, shape_chunk
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.scheduler.stats import RequestStats

W, BASE = 8, 16
FIRST_PRUNED = W + BASE
LAYOUT = CacheLayout(((3, 98), (0, 16)), window=W, base=BASE)


@pytest.fixture(scope="module", autouse=True)
def installed():
    patches.install()


class OneManager(SparseMMManager):
    """A manager without a pool: what chunk and hit rules look at."""

    def __init__(self, layout):
        self.layout, self.block_size, self.prompts = layout, 16, {}
        self.prune_when_free_below, self.limits = None, RequestLimits(layout.window, 99)
        self.stats, self.refused = RequestStats(), {}


def kv_cache_manager(*managers):
    return SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=managers))


def sparse_manager(layout=LAYOUT):
    return kv_cache_manager(SimpleNamespace(), OneManager(layout))


def request_of(n, num_tokens=None, name="r", extra_args=None):
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=n,
        num_tokens=num_tokens or n,
        block_hashes=["h"],
        sampling_params=SamplingParams(extra_args=extra_args),
        resumable=False,
    )


# Chunks


def chunk_ends(n, hit, sizes, window):
    """Ends of the chunks of a prompt when vLLM offers these sizes, and the step of each."""
    layout = CacheLayout(LAYOUT.capacities, window=window, base=BASE)
    manager, request = sparse_manager(layout), request_of(n)
    prefix_hit_limit(manager, request)
    computed, ends = hit, []
    for step, size in enumerate(sizes):
        offered = min(size, n - computed)
        taken = shape_chunk(manager, request, computed, offered)
        assert 0 <= taken <= offered
        if taken:
            computed += taken
            ends.append((step, computed))
        if computed == n:
            break
    return ends


@pytest.mark.parametrize("n", [FIRST_PRUNED, FIRST_PRUNED + 1, 3 * W, 100, 101])
@pytest.mark.parametrize("size", [*range(W, 3 * W), 99, 100, 101, 200])
def test_equal_chunks_reach_the_prompts_end(n, size):
    for hit in (0, 1, n - 2 * W, n - W - 1, n - W):
        ends = chunk_ends(n, hit, [size] * 200, W)
        assert ends[-1][1] == n
        assert ends[-1][0] == len(ends) - 1, "every step made progress"
        starts = [hit, *(end for _, end in ends)]
        assert starts[-1] - starts[-2] >= W, "the last chunk holds the window"


@given(
    st.integers(0, 200),
    st.integers(1, 40),
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.data(),
)
def test_any_chunks(older, window, sizes, data):
    """Some of them too small for the window: those may do nothing, but never harm."""
    n = window + BASE + older
    hit = data.draw(st.integers(0, n - window))
    ends = chunk_ends(n, hit, sizes, window)
    for _, end in ends:
        assert end <= n - window or end == n
    acted = {step for step, _ in ends}
    finished = bool(ends) and ends[-1][1] == n
    for step, size in enumerate(sizes[: ends[-1][0] if finished else len(sizes)]):
        assert step in acted or size < window
    if finished:
        start = ends[-2][1] if len(ends) > 1 else hit
        assert n - start >= window


@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_a_prompt_never_ends_with_a_chunk_of_one_token(size):
    """vLLM would run it as a decode, where nothing is pruned."""
    n = FIRST_PRUNED + 20
    starts = [0, *(end for _, end in chunk_ends(n, 0, [size] * 200, window=1))]
    assert starts[-1] == n
    assert starts[-1] - starts[-2] >= 2


@pytest.mark.parametrize("new", [1, W - 1, W, 40])
def test_a_prompt_that_is_not_pruned_is_left_alone(new):
    manager, request = sparse_manager(), request_of(FIRST_PRUNED - 1)
    prefix_hit_limit(manager, request)
    assert shape_chunk(manager, request, 0, new) == new


@pytest.mark.parametrize("new", [1, W - 1, W, 40])
def test_other_caches_are_left_alone(new):
    request = request_of(100)
    manager = kv_cache_manager(SimpleNamespace(), SimpleNamespace())
    assert shape_chunk(manager, request, 95, new) == new
    assert prefix_hit_limit(manager, request) is None


@pytest.mark.parametrize("new", [1, 3, 50])
def test_generated_tokens_are_left_alone(new):
    """Decode steps, speculation, and what a resumed request recomputes of its answer."""
    assert shape_chunk(sparse_manager(), request_of(100, 160), 100, new) == new
    assert shape_chunk(sparse_manager(), request_of(100, 160), 117, new) == new


@pytest.mark.parametrize("start", [0, 100 - 2 * W, 100 - W])
def test_a_resumed_request_stops_at_the_prompts_end(start):
    """Its answer must not be computed with the prompt: it attended to a pruned one."""
    manager, request = sparse_manager(), request_of(100, 160)
    prefix_hit_limit(manager, request)
    taken = shape_chunk(manager, request, start, 160 - start)
    assert start + taken == 100


# Prefix hits


@pytest.mark.parametrize(
    ("n", "num_tokens", "longest_hit"),
    [
        (FIRST_PRUNED - 1, FIRST_PRUNED - 1, FIRST_PRUNED - 2),  # vLLM's own rule
        (FIRST_PRUNED - 1, 90, 89),  # dense answers may come from the cache
        (FIRST_PRUNED, FIRST_PRUNED, FIRST_PRUNED - W),
        (100, 100, 100 - W),
        (100, 160, 100 - W),  # resumed: not from an answer either
    ],
)
def test_hits_leave_the_window(n, num_tokens, longest_hit):
    """By the lookup of either release: both find all that they may."""
    request, manager = request_of(n, num_tokens), sparse_manager()
    for release in (lookup_0_32, lookup_0_33):
        look_up = patches._computed_blocks(release)
        assert look_up(manager, request) == (longest_hit, request.block_hashes, n)
        assert request.num_tokens == num_tokens, "the request itself is unchanged"


@pytest.mark.parametrize("asked", [0, 17, 100 - W, 99])
def test_a_bound_of_vllms_own_counts_too(asked):
    """0.33 gives one, by position, to read hidden states of tokens that are computed."""
    look_up = patches._computed_blocks(lookup_0_33)
    expected = min(asked, 100 - W)
    assert look_up(sparse_manager(), request_of(100), asked)[0] == expected
    assert look_up(sparse_manager(), request_of(100), max_cache_hit_length=asked)[0] == expected
    short = request_of(FIRST_PRUNED - 1)
    assert look_up(sparse_manager(), short, 5)[0] == 5, "of what is not pruned, vLLM's alone"


def lookup_0_32(self, request):
    """`KVCacheManager.get_computed_blocks` of a cache that holds everything: longest hit."""
    return request.num_tokens - 1, request.block_hashes, request.num_prompt_tokens


def lookup_0_33(self, request, max_cache_hit_length=None):
    if max_cache_hit_length is None:
        max_cache_hit_length = request.num_tokens - 1
    return max_cache_hit_length, request.block_hashes, request.num_prompt_tokens


def test_the_manager_learns_the_prompts_length():
    manager = sparse_manager()
    ours = manager.coordinator.single_type_managers[1]
    prefix_hit_limit(manager, request_of(100, name="long"))
    prefix_hit_limit(manager, request_of(9, name="short"))
    assert ours.prompts["long"].tokens == 100
    assert ours.prompts["long"].compact_blocks == LAYOUT.compact_blocks(100, 16)
    assert ours.prompts["long"].freed_blocks == (100 - W) // 16
    assert ours.prompts["short"].compact_blocks == ours.prompts["short"].freed_blocks == 0
