"""Requests on a real vLLM block pool, moved as its scheduler does, and what must hold of them."""

from collections import Counter
from dataclasses import replace

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import received
from sparsemm_vllm.engine.scheduler.chunks import shape_chunk
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.spec import SparseMMSpec

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
# Lengths around a page, around the first pruned prompt, and some pages more.
LENGTHS = [1, P - 1, P, P + 1, FIRST_PRUNED - 1, FIRST_PRUNED, FIRST_PRUNED + 1, 23, 24, 25, 40]


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
        sent = received(request.sampling_params.extra_args, self.sparse.limits)
        assert sent.layout(self.layout) == layout, "workers have another"
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
            if processed >= n and self.layout_of(request).is_pruned(n):
                self.pruned.add(name)  # whether or not the step then fits
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
