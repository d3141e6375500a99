"""Blocks on a real vLLM block pool: what each request holds, and what it never shares."""

import pickle

import pytest
import torch
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.spec import SparseMMSpec
from support.chats import (
    BASE,
    FIRST_PRUNED,
    LAYOUT,
    LENGTHS,
    METHOD_LAYOUTS,
    Chats,
    P,
    W,
    make_request,
    make_spec,
)


@pytest.fixture(scope="module", autouse=True)
def installed():
    patches.install()
    init_none_hash(sha256)


@pytest.mark.parametrize("n", [n for n in LENGTHS if n >= FIRST_PRUNED])
@pytest.mark.parametrize("tokens", [W, W + 1, 7, 1000])
@pytest.mark.parametrize("layout", METHOD_LAYOUTS, ids=lambda layout: layout.method)
def test_life_of_a_pruned_request(n, tokens, layout):
    """Chunks, prune step, decoding over several blocks: the row is the documented one."""
    chats = Chats(blocks=200, layout=layout)
    request = chats.add(range(n))
    N, C = -(-n // P), layout.compact_blocks(n, P)
    assert C > 0
    assert chats.admit(request, tokens)
    while request.num_computed_tokens < n:
        assert len(chats.row(request)) == -(-request.num_computed_tokens // P)
        chats.process(request)
        assert chats.step(request, tokens)
    chats.check()
    row = list(chats.row(request))
    assert len(row) == N + C
    assert not any(b.is_null for b in row), "the prune step reads all prompt blocks"
    chats.process(request)
    for generated in range(1, 3 * P):
        chats.run(request)
        chats.check()
        gone = (n - W) // P
        held = chats.row(request)
        assert all(b.is_null for b in held[:gone])
        assert held[gone : N + C] == row[gone:], "what is kept stays where it is"
        assert len(held) == -(-(n + generated) // P) + C
    chats.finish(request)
    chats.close()


def test_a_short_prompt_is_vllms_own():
    chats = Chats(blocks=50)
    request = chats.add(range(FIRST_PRUNED - 1))
    chats.prefill(request)
    for _ in range(2 * P):
        chats.run(request)
        chats.check()
    assert len(chats.row(request)) == -(-request.num_computed_tokens // P)
    # Its answer was computed densely, so a next turn may use it.
    following = chats.add([*request.all_token_ids, 77])
    _, num_hit, _ = chats.manager.get_computed_blocks(following)
    assert num_hit == request.num_computed_tokens // P * P
    chats.close()


def test_outstanding_steps_keep_the_prompt_blocks():
    """Async scheduling: decode steps are scheduled before the prune step has been processed."""
    n = 25
    chats = Chats(blocks=60)
    request = chats.add(range(n))
    assert chats.admit(request)
    for _ in range(3):
        assert chats.step(request)
        assert not any(b.is_null for b in chats.row(request))
        chats.check()
    chats.process(request, 2)
    assert chats.step(request)
    assert sum(b.is_null for b in chats.row(request)) == (n - W) // P
    chats.check()
    chats.close()


@pytest.mark.parametrize("lookahead", [W - 1, W, W + 1, W + 2 * P])
def test_lookahead_that_crosses_the_prompts_end_early(lookahead):
    """Slots for tokens not yet drafted must not take the place of the compact blocks."""
    n = 24
    chats = Chats(blocks=60)
    request = chats.add(range(n))
    assert chats.admit(request, n - W, lookahead)
    chats.check()
    assert len(chats.row(request)) == (
        -(-(n - W + lookahead) // P) + (LAYOUT.compact_blocks(n, P) if lookahead >= W else 0)
    )
    early = list(chats.row(request))
    chats.process(request)
    chats.run(request, lookahead=lookahead)
    assert chats.row(request)[: len(early)] == early
    chats.check()
    chats.close()


def test_a_resumed_request_starts_over():
    """Not from the answer that another chat has put into the prefix cache as part of its prompt."""
    n = 24
    chats = Chats(blocks=120)
    request = chats.add(range(n))
    chats.prefill(request)
    for _ in range(2 * P):
        chats.run(request)
    assert request.num_tokens > n + P
    other = chats.add([*request.all_token_ids, *range(500, 520)])
    chats.prefill(other)
    chats.preempt(request)
    chats.check()
    _, num_hit, _ = chats.manager.get_computed_blocks(request)
    assert num_hit == (n - W) // P * P
    chats.prefill(request)
    assert request.num_computed_tokens == n, "answer tokens come after the prune step"
    chats.run(request)
    assert request.num_computed_tokens == request.num_tokens - 1
    chats.check()
    chats.close()


def test_an_answer_never_enters_the_prefix_cache():
    n = 24
    chats = Chats(blocks=120)
    request = chats.add(range(n))
    chats.prefill(request)
    for _ in range(4 * P):
        chats.run(request)
    following = chats.add([*request.all_token_ids, 77])
    _, num_hit, _ = chats.manager.get_computed_blocks(following)
    assert num_hit == n // P * P
    chats.close()


def test_freed_prompt_blocks_still_serve_hits():
    n = 40
    chats = Chats(blocks=120)
    first = chats.add(range(n))
    chats.prefill(first)
    chats.run(first)
    second = chats.add([*range(n - P), *range(700, 700 + P)])
    free = chats.pool.get_num_free_blocks()
    blocks, num_hit, _ = chats.manager.get_computed_blocks(second)
    assert num_hit == (n - P) // P * P
    assert sum(b.ref_cnt == 0 for b in blocks.blocks[0]) == (n - W) // P
    chats.prefill(second)
    chats.check()
    assert free - chats.pool.get_num_free_blocks() == n // P + LAYOUT.compact_blocks(n, P)
    chats.finish(first)
    chats.check()
    chats.close()


@pytest.mark.parametrize("spare", [-1, 0])
def test_admission_counts_the_compact_blocks(spare):
    """One block less than prompt and compact blocks: dense it would fit, it must wait."""
    n = 24
    needed = -(-n // P) + LAYOUT.compact_blocks(n, P)
    chats = Chats(blocks=1 + needed + spare)
    assert -(-n // P) < needed + spare
    request = chats.add(range(n))
    # A first chunk that fits either way: only the whole prompt does not.
    assert chats.admit(request, tokens=P) == (spare == 0)
    chats.check()
    chats.close()


def test_a_step_without_room_for_compact_blocks_takes_nothing():
    n = 24
    chats = Chats(blocks=1 + 2 * (-(-n // P)))
    first = chats.add(range(n))
    other = chats.add(range(300, 300 + FIRST_PRUNED - 1))
    assert chats.admit(first, n - W)
    chats.process(first)
    assert chats.admit(other)
    chats.process(other)
    while chats.step(other):  # a decoding chat takes what is left
        chats.process(other)
    row = list(chats.row(first))
    assert not chats.step(first)
    assert chats.row(first) == row
    chats.check()
    chats.close()


def test_free_of_an_unknown_request_is_harmless():
    chats = Chats(blocks=20)
    chats.manager.free(make_request("never-admitted", range(9)))
    chats.check()
    chats.close()


# The spec


def test_specs_are_values():
    spec, same = make_spec(), make_spec()
    copy = pickle.loads(pickle.dumps(spec))
    assert spec == same == copy
    assert len({spec, same, copy}) == 1
    assert isinstance(copy, SparseMMSpec)
    assert copy.layout.capacities == LAYOUT.capacities
    other = CacheLayout(((0, 11), (P, 500), (2, 2)), window=W, base=BASE)
    assert spec != make_spec(other)
    assert spec != make_spec(head_size=16)
    with pytest.raises(AttributeError):
        spec.layout = other


def test_merge_keeps_the_layout():
    merged = SparseMMSpec.merge([make_spec(), make_spec()])
    assert merged == make_spec()
    other = CacheLayout(LAYOUT.capacities, window=W, base=BASE + 1)
    with pytest.raises(AssertionError, match="equal specs"):
        SparseMMSpec.merge([make_spec(), make_spec(other)])


def test_a_group_takes_equal_specs_only():
    spec = make_spec()
    assert spec.is_uniform_with_collection({"a": make_spec(), "b": make_spec()})
    other = CacheLayout(LAYOUT.capacities, window=W, base=BASE + 1)
    assert not spec.is_uniform_with_collection({"a": make_spec(), "b": make_spec(other)})
    dense = FullAttentionSpec(block_size=P, num_kv_heads=2, head_size=8, dtype=torch.float32)
    assert not spec.is_uniform_with_collection({"a": make_spec(), "b": dense})


def test_the_spec_is_registered_beside_vllms_own():
    assert KVCacheSpecRegistry.get_manager_class(make_spec()) is SparseMMManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(make_spec()) is SparseMMSpec
    dense = FullAttentionSpec(block_size=P, num_kv_heads=2, head_size=8, dtype=torch.float32)
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(dense) is FullAttentionSpec


class ModelConfig:
    max_model_len = 40


class ParallelConfig:
    decode_context_parallel_size = 1


class VllmConfig:
    model_config, parallel_config = ModelConfig, ParallelConfig


@pytest.mark.parametrize("length", [FIRST_PRUNED - 1, FIRST_PRUNED, 39, 40])
def test_a_row_holds_both_copies_of_the_longest_prompt(length):
    spec = make_spec()
    entries = spec.max_num_blocks_per_req(VllmConfig, length)
    assert entries == -(-length // P) + LAYOUT.compact_blocks(length, P)
    for n in range(1, length + 1):
        assert -(-length // P) + LAYOUT.compact_blocks(n, P) <= entries


def test_memory_of_one_request_is_that_of_its_row():
    spec = make_spec()
    blocks = spec.max_num_blocks_per_req(VllmConfig, ModelConfig.max_model_len)
    assert spec.max_memory_usage_bytes(VllmConfig) == blocks * spec.page_size_bytes
    assert spec.page_size_bytes == P * 2 * 2 * 8 * 4  # tokens, heads, K and V, head size, bytes


@pytest.mark.parametrize("n", [23, 24, 25, 40])
@pytest.mark.parametrize("tokens", [1, W, 1000])
def test_a_hit_that_ends_inside_a_block(n, tokens):
    """vLLM finds such hits beside aligned states only, and then the request writes a copy.

    SPARSEMM refuses models with states; if a later vLLM had such hits elsewhere, blocks would still
    be counted exactly, a shared block never written, and the copy pruned like any prompt block.
    """
    chats = Chats(blocks=120)
    first = chats.add(range(n))
    chats.prefill(first)
    manager, pool, name = chats.sparse, chats.pool, "second"
    second = make_request(name, range(n))
    hit = n - W if (n - W) % P else n - W - 1
    assert hit % P
    manager.register_prompt(second)
    shared = list(chats.row(first)[: -(-hit // P)])
    if any(block.is_null for block in shared):
        pytest.fail("the first request's prompt blocks are gone")
    C, computed = LAYOUT.compact_blocks(n, P), min(n, hit + tokens)
    free = pool.get_num_free_blocks()
    needed = manager.get_num_blocks_to_allocate(name, computed, shared, hit, hit, computed)
    manager.add_local_computed_blocks(name, shared, hit, 0)
    manager.allocate_new_blocks(name, computed, computed)
    assert free - pool.get_num_free_blocks() == needed
    ((source, copy),) = manager.take_pending_cow_copies()
    row = manager.req_to_blocks[name]
    assert source is shared[-1]
    assert row[len(shared) - 1] is copy
    assert row[: len(shared) - 1] == shared[:-1]
    while computed < n:
        computed = min(n, computed + W)
        manager.allocate_new_blocks(name, computed, computed)
    assert len(row) == -(-n // P) + C
    written = row[hit // P :]
    assert not set(map(id, written)) & set(map(id, chats.row(first)))
    pool.free_blocks([source, copy])  # vLLM does, when the worker has copied
    manager.remove_skipped_blocks(name, n, n)
    gone = LAYOUT.freed_blocks(n, P)
    assert all(block.is_null for block in row[:gone])
    assert not any(block.is_null for block in row[gone:])
    pool.free_blocks(manager.pop_blocks_for_free(name))
    assert pool.get_num_free_blocks() == free
    chats.check()
    chats.close()
