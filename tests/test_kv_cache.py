"""Blocks on a real vLLM block pool: what each request holds, and what it never shares.

The machine below does what vLLM's scheduler does around `KVCacheManager`, in any order that
hypothesis can think of, with output of earlier steps outstanding as with async scheduling.
"""

import pickle
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from sparsemm_vllm import patches
from sparsemm_vllm.kv_cache import SparseMMManager, SparseMMSpec
from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.request_settings import request_layout
from sparsemm_vllm.request_stats import Outcome
from sparsemm_vllm.scheduling import shape_chunk

P, W, BASE = 4, 3, 5
FIRST_PRUNED = W + BASE
# Unequal, with an empty head, one of a page and one that no prompt here fills.
LAYOUT = CacheLayout(((0, 11), (P, 500), (1, 2)), window=W, base=BASE)
# With scores, so that a request may have a budget of its own: 0 to 23 tokens, up to 170.
SCORES = torch.tensor([[0.0, 11.0], [P, 60.0], [1.0, 2.0]])
SCORED = CacheLayout.from_scores(SCORES, 2, W + BASE, W, rho=0.0, largest_budget=40)
ASKED = [None] * 3 + [{"sparsemm": 0}] + [{"sparsemm_budget": b} for b in (W + 1, 20, 40)]
# The same, of methods whose blocks follow from more than one table of capacities.
METHOD_LAYOUTS = [
    LAYOUT,
    replace(LAYOUT, redistribute=True),
    *(
        CacheLayout.from_scores(torch.ones(3, 2), 2, W + BASE, W, method=method)
        for method in ("pyramidkv", "adakv")
    ),
]


@pytest.fixture(scope="module", autouse=True)
def installed():
    patches.install()
    init_none_hash(sha256)


def make_spec(layout=LAYOUT, **options):
    return SparseMMSpec(
        **{"block_size": P, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32} | options,
        layout=layout,
    )


def make_manager(blocks, layout=LAYOUT, caching=True):
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["model.layers.0"], make_spec(layout))],
    )
    return KVCacheManager(
        config,
        max_model_len=400,
        scheduler_block_size=P,
        hash_block_size=P,
        enable_caching=caching,
    )


def make_request(name, prompt, extra_args=None):
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=100, extra_args=extra_args),
        pooling_params=None,
        block_hasher=get_request_block_hasher(P, sha256),
    )


class Chats:
    """vLLM's scheduler, as far as blocks are concerned; checks every allocation it makes."""

    def __init__(self, blocks, layout=LAYOUT, caching=True):
        self.manager = make_manager(blocks, layout, caching)
        self.layout, self.total = layout, blocks
        self.waiting, self.running = [], []
        self.layouts = {}  # of each request that has been admitted once
        self.outstanding = {}  # steps not processed yet: tokens, drafts, and whether they sample
        self.allocated = {}  # tokens that a request has slots for
        self.pruned = set()  # requests whose older prompt blocks have been freed
        self.count = 0

    @property
    def pool(self):
        return self.manager.block_pool

    @property
    def sparse(self):
        (manager,) = self.manager.coordinator.single_type_managers
        assert isinstance(manager, SparseMMManager)
        return manager

    def row(self, request):
        return self.sparse.req_to_blocks[request.request_id]

    def add(self, prompt, extra_args=None):
        request = make_request(f"chat-{self.count}", prompt, extra_args)
        self.count += 1
        self.waiting.append(request)
        return request

    def admit(self, request, tokens=1000, lookahead=0):
        """First chunk of a new or a preempted request; whether it fits."""
        n, layout = request.num_prompt_tokens, self._expected_layout(request)
        hit, num_hit, _ = self.manager.get_computed_blocks(request)
        assert self.sparse.prompts[request.request_id].layout == layout
        assert request_layout(self.layout, request.sampling_params.extra_args) == layout
        assert num_hit < request.num_tokens
        if layout.is_pruned(n):
            assert num_hit <= n - W, "the window queries must be computed"
        assert all(b.block_hash for b in hit.blocks[0])
        if not self._allocate(request, tokens, lookahead, num_hit, hit):
            return False
        self.layouts[request.request_id] = layout
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def _expected_layout(self, request):
        """By what the request asks, and by the pool when it is admitted first."""
        if request.request_id in self.layouts:
            return self.layouts[request.request_id]
        asked, share = request.sampling_params.extra_args or {}, self.sparse.prune_when_free_below
        budget = asked.get("sparsemm_budget", self.layout.base + W)
        layout = self.layout.of_budget(budget) if asked.get("sparsemm", 1) else self.layout.dense
        if share is not None and layout.is_pruned(n := request.num_prompt_tokens):
            left = self.pool.get_num_free_blocks() - -(-n // P)
            layout = self.layout.dense if left >= share * self.total else layout
        return layout

    def layout_of(self, request):
        return self.sparse.prompts[request.request_id].layout

    def step(self, request, tokens=1000, lookahead=0, drafts=0):
        """A later chunk, or a decode step. Whether there was anything to do and it fits."""
        return self._allocate(request, tokens, lookahead, drafts=drafts)

    def _allocate(self, request, tokens, lookahead, num_hit=0, hit=None, drafts=0):
        name, n = request.request_id, request.num_prompt_tokens
        computed = request.num_computed_tokens + num_hit
        left = request.num_tokens + request.num_output_placeholders - computed
        drafts = drafts if left == 1 and computed >= n else 0
        left, tokens = left + drafts, max(tokens, 1 + drafts)
        new = shape_chunk(self.manager, request, computed, min(tokens, left))
        if new == 0:
            return False
        processed = computed - request.num_in_flight_tokens
        if hit is None:
            self.manager.remove_skipped_blocks(name, processed, n)
        before = [] if hit is None else hit.blocks[0]
        written = self._written(request, computed, new)
        for entry in written & set(range(len(before or self.row(request)))):
            block = (before or self.row(request))[entry]
            assert not block.is_null
            assert block.ref_cnt == 1, "a shared block would be written"
            assert block.block_hash is None, "a hashed block would be written"
        free = self.pool.get_num_free_blocks()
        needed = self._needed(request, computed, computed + new + lookahead, num_hit, hit)
        everything = self._needed(request, computed, request.num_tokens, num_hit, hit)
        fits = needed <= free and (hit is None or everything <= free)
        blocks = self.manager.allocate_slots(
            request,
            new,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=hit,
            num_lookahead_tokens=lookahead,
            full_sequence_must_fit=hit is not None,
        )
        assert (blocks is not None) == fits
        assert free - self.pool.get_num_free_blocks() == (needed if fits else 0)
        if not fits:
            return False
        assert all(self.row(request)[entry].ref_cnt == 1 for entry in written)
        request.num_computed_tokens = computed + new
        request.num_in_flight_tokens += new
        slots = computed + new + lookahead
        self.allocated[name] = max(self.allocated.get(name, 0), slots)
        if processed >= n and self.layout_of(request).is_pruned(n):
            self.pruned.add(name)
        known = request.num_tokens + request.num_output_placeholders
        samples = request.num_computed_tokens == known + drafts
        request.num_output_placeholders += samples * (1 + drafts)
        self.outstanding.setdefault(name, []).append((new, drafts, samples))
        return True

    def _needed(self, request, computed, tokens, num_hit, hit):
        empty = self.manager.empty_kv_cache_blocks
        return self.manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=tokens,
            new_computed_blocks=(hit or empty).blocks,
            num_encoder_tokens=0,
            total_computed_tokens=computed,
            num_local_computed_tokens=computed,
            num_tokens_main_model=tokens,
        )

    def _written(self, request, computed, new):
        """Row entries that a step writes to: of its tokens and, if it prunes, the compact ones."""
        n = request.num_prompt_tokens
        N, C = -(-n // P), self.layout_of(request).compact_blocks(n, P)
        entries = {t // P + (C if t // P >= N else 0) for t in range(computed, computed + new)}
        return entries | set(range(N, N + C)) if computed < n <= computed + new else entries

    def process(self, request, steps=1, accepted=0):
        """The output of the oldest steps arrives, with so many of their drafts accepted."""
        for _ in range(steps):
            new, drafts, samples = self.outstanding[request.request_id].pop(0)
            request.num_in_flight_tokens -= new
            rejected = max(0, drafts - accepted)
            request.num_computed_tokens -= rejected
            request.num_output_placeholders -= rejected
            for _ in range(1 + drafts - rejected if samples else 0):
                request.num_output_placeholders -= 1
                request.append_output_token_ids(1000 + request.num_tokens)
            if self.manager.enable_caching:
                done = request.num_computed_tokens - request.num_output_placeholders
                self.manager.cache_blocks(request, done)

    def run(self, request, tokens=1000, lookahead=0):
        """Step and process, as without async scheduling."""
        assert self.step(request, tokens, lookahead)
        self.process(request)

    def prefill(self, request, tokens=1000):
        assert self.admit(request, tokens)
        self.process(request)
        while request.num_computed_tokens < request.num_prompt_tokens:
            self.run(request, tokens)

    def preempt(self, request):
        self._forget(request)
        request.num_computed_tokens = request.num_in_flight_tokens = 0
        request.num_output_placeholders = 0
        request.num_preemptions += 1
        self.waiting.append(request)

    def finish(self, request):
        self._forget(request)

    def _forget(self, request):
        (self.running if request in self.running else self.waiting).remove(request)
        self.manager.free(request)
        assert request.request_id not in self.sparse.prompts
        for record in (self.outstanding, self.allocated):
            record.pop(request.request_id, None)
        self.pruned.discard(request.request_id)

    def expected_row(self, request):
        """Entries of the row, and how many of them are null."""
        n, slots = request.num_prompt_tokens, self.allocated[request.request_id]
        layout = self.layouts[request.request_id]
        compact = layout.compact_blocks(n, P) if slots >= n else 0
        gone = layout.freed_blocks(n, P) if request.request_id in self.pruned else 0
        return -(-slots // P) + compact, gone

    def check(self):
        """What must hold after every step."""
        owners = Counter()
        for request in self.running:
            row = self.row(request)
            length, gone = self.expected_row(request)
            assert [b.is_null for b in row] == [True] * gone + [False] * (length - gone)
            held = [b.block_id for b in row if not b.is_null]
            assert len(held) == len(set(held))
            owners.update(held)
            n, layout = request.num_prompt_tokens, self.layouts[request.request_id]
            if request.request_id in self.pruned and self.allocated[request.request_id] <= (
                request.num_computed_tokens
            ):
                assert len(held) == layout.held_blocks(n, request.num_computed_tokens, P)
            if layout.is_pruned(n):
                private = row[n // P :]  # partly filled, compact and growth blocks
                assert not any(b.block_hash for b in private)
                assert all(b.ref_cnt == 1 for b in private)
        for block_id, count in owners.items():
            block = self.pool.blocks[block_id]
            assert block.ref_cnt == count
            assert count == 1 or block.block_hash is not None
        free = self.pool.get_num_free_blocks()
        assert free + len(owners) + 1 == self.total
        for request in self.waiting:
            assert not self.row(request)

    def close(self):
        for request in self.running + self.waiting:
            self.finish(request)
        assert self.pool.get_num_free_blocks() == self.total - 1
        assert not self.sparse.prompts, "state of requests that are gone"
        assert not {k: v for k, v in self.sparse.req_to_blocks.items() if v}


# Lengths around a page, around the first pruned prompt, and some pages more.
LENGTHS = [1, P - 1, P, P + 1, FIRST_PRUNED - 1, FIRST_PRUNED, FIRST_PRUNED + 1, 23, 24, 25, 40]


class Engine(RuleBasedStateMachine):
    caching = True
    seen: ClassVar[Counter] = Counter()

    def __init__(self):
        super().__init__()
        # Room for two or three of the longest requests: most histories run out of blocks.
        self.chats = Chats(blocks=48, layout=SCORED, caching=self.caching)

    def one_of(self, data, requests):
        return data.draw(st.sampled_from(requests))

    @initialize(share=st.sampled_from([None, 0.3, 0.7]))
    def choose_policy(self, share):
        self.chats.sparse.prune_when_free_below = share

    @precondition(lambda self: len(self.chats.waiting) < 5)
    @rule(
        family=st.integers(0, 1),
        shared=st.integers(0, 30),
        n=st.sampled_from(LENGTHS),
        asked=st.sampled_from(ASKED),
    )
    def add(self, family, shared, n, asked):
        prefix = [100 * family + i for i in range(min(shared, n))]
        tail = [5000 + 100 * self.chats.count + i for i in range(n - len(prefix))]
        self.chats.add(prefix + tail, asked)

    @precondition(lambda self: self.chats.running and len(self.chats.waiting) < 5)
    @rule(data=st.data(), extra=st.integers(1, 9), asked=st.sampled_from(ASKED))
    def add_next_turn(self, data, extra, asked):
        earlier = self.one_of(data, self.chats.running)
        self.chats.add([*earlier.all_token_ids, *range(9000, 9000 + extra)][:60], asked)

    @precondition(lambda self: self.chats.waiting)
    @rule(data=st.data(), tokens=st.integers(1, 60), lookahead=st.integers(0, 5))
    def admit(self, data, tokens, lookahead):
        request = self.one_of(data, self.chats.waiting)
        resumed = request.request_id in self.chats.layouts
        if self.chats.admit(request, tokens, lookahead):
            self.seen["resumed" if resumed else "admitted"] += 1
            self.seen["hits"] += request.num_computed_tokens > request.num_in_flight_tokens
            self.seen[self.chats.sparse.prompts[request.request_id].outcome] += 1

    @precondition(lambda self: self.chats.running)
    @rule(
        data=st.data(),
        tokens=st.integers(1, 60),
        lookahead=st.integers(0, 5),
        drafts=st.integers(0, 4),
    )
    def step(self, data, tokens, lookahead, drafts):
        self.chats.step(self.one_of(data, self.chats.running), tokens, lookahead, drafts)

    @precondition(lambda self: self.chats.running)
    @rule(data=st.data(), accepted=st.integers(0, 4))
    def process(self, data, accepted):
        request = self.one_of(data, self.chats.running)
        if outstanding := self.chats.outstanding.get(request.request_id):
            self.seen["rejected"] += outstanding[0][1] > accepted
            self.chats.process(request, accepted=accepted)

    @precondition(lambda self: self.chats.running)
    @rule(
        data=st.data(),
        steps=st.integers(1, 3 * P),
        tokens=st.integers(W, 60),
        drafts=st.integers(0, 3),
        accepted=st.integers(0, 3),
    )
    def run(self, data, steps, tokens, drafts, accepted):
        request = self.one_of(data, self.chats.running)
        self.chats.process(request, len(self.chats.outstanding[request.request_id]))
        for _ in range(steps):
            if self.chats.step(request, tokens, drafts=drafts):
                self.seen["rejected"] += self.chats.outstanding[request.request_id][0][1] > accepted
                self.chats.process(request, accepted=accepted)
                self.chats.check()

    @precondition(lambda self: self.chats.running)
    @rule(data=st.data())
    def preempt(self, data):
        request = self.one_of(data, self.chats.running)
        self.seen["preempted in flight"] += request.num_in_flight_tokens > 0
        self.chats.preempt(request)

    @precondition(lambda self: self.chats.running)
    @rule(data=st.data())
    def finish(self, data):
        self.chats.finish(self.one_of(data, self.chats.running))

    @precondition(lambda self: self.chats.waiting)
    @rule(data=st.data())
    def abort_while_waiting(self, data):
        self.chats.finish(self.one_of(data, self.chats.waiting))

    @invariant()
    def holds(self):
        self.seen["steps"] += 1
        self.seen["pruned and freed"] += bool(self.chats.pruned)
        self.chats.check()

    def teardown(self):
        self.chats.close()


class EngineWithoutCaching(Engine):
    caching = False


def run_histories(machine, examples, steps):
    """Steps of all kinds, as many as asked for; not all examples run to their end."""
    Engine.seen.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Engine.seen


# Without these the histories would prove little.
KINDS = ["admitted", "resumed", "rejected", "preempted in flight", "pruned and freed", *Outcome]


@pytest.mark.parametrize("machine", [Engine, EngineWithoutCaching])
def test_any_history(machine):
    seen = run_histories(machine, examples=220, steps=60)
    assert seen["steps"] >= 10_000
    assert min(seen[kind] for kind in KINDS) > 20, seen
    assert (seen["hits"] > 20) == machine.caching


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("machine", [Engine, EngineWithoutCaching])
def test_a_million_steps_of_any_history(machine):
    assert run_histories(machine, examples=9_000, steps=60)["steps"] >= 500_000


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
