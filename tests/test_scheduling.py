"""Chunk ends and prefix hits, alone and under vLLM's real scheduler with many requests."""

import random
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from sparsemm_vllm import patches
from sparsemm_vllm.kv_cache import SparseMMManager, SparseMMSpec
from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.scheduling import limit_prefix_hit, shape_chunk
from sparsemm_vllm.settings import Settings
from sparsemm_vllm.support import build_layout

W, BASE = 8, 16
FIRST_PRUNED = W + BASE
LAYOUT = CacheLayout(((3, 98), (0, 16)), window=W, base=BASE)


@pytest.fixture(scope="module", autouse=True)
def installed():
    patches.install()


class OneManager(SparseMMManager):
    """A manager without a pool: what chunk and hit rules look at."""

    def __init__(self, layout):
        self.layout, self.block_size, self._prompts = layout, 16, {}


def kv_cache_manager(*managers):
    return SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=managers))


def sparse_manager(layout=LAYOUT):
    return kv_cache_manager(SimpleNamespace(), OneManager(layout))


def request_of(n, num_tokens=None, name="r"):
    return SimpleNamespace(
        request_id=name, num_prompt_tokens=n, num_tokens=num_tokens or n, block_hashes=["h"]
    )


# Chunks


def chunk_ends(n, hit, sizes, window):
    """Ends of the chunks of a prompt when vLLM offers these sizes, and the step of each."""
    layout = CacheLayout(LAYOUT.capacities, window=window, base=BASE)
    manager, request = sparse_manager(layout), request_of(n)
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
    assert shape_chunk(sparse_manager(), request_of(FIRST_PRUNED - 1), 0, new) == new


@pytest.mark.parametrize("new", [1, W - 1, W, 40])
def test_other_caches_are_left_alone(new):
    request = request_of(100)
    manager = kv_cache_manager(SimpleNamespace(), SimpleNamespace())
    assert shape_chunk(manager, request, 95, new) == new
    assert limit_prefix_hit(manager, request) is request


@pytest.mark.parametrize("new", [1, 3, 50])
def test_generated_tokens_are_left_alone(new):
    """Decode steps, speculation, and what a resumed request recomputes of its answer."""
    assert shape_chunk(sparse_manager(), request_of(100, 160), 100, new) == new
    assert shape_chunk(sparse_manager(), request_of(100, 160), 117, new) == new


@pytest.mark.parametrize("start", [0, 100 - 2 * W, 100 - W])
def test_a_resumed_request_stops_at_the_prompts_end(start):
    """Its answer must not be computed with the prompt: it attended to a pruned one."""
    taken = shape_chunk(sparse_manager(), request_of(100, 160), start, 160 - start)
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
    request = request_of(n, num_tokens)
    seen = limit_prefix_hit(sparse_manager(), request)
    assert seen.num_tokens - 1 == longest_hit  # vLLM's max_cache_hit_length
    assert seen.block_hashes is request.block_hashes
    assert seen.num_prompt_tokens == n
    assert request.num_tokens == num_tokens, "the request itself is unchanged"


def test_the_manager_learns_the_prompts_length():
    manager = sparse_manager()
    ours = manager.coordinator.single_type_managers[1]
    limit_prefix_hit(manager, request_of(100, name="long"))
    limit_prefix_hit(manager, request_of(9, name="short"))
    assert ours._prompts["long"].tokens == 100
    assert ours._prompts["long"].compact_blocks == LAYOUT.compact_blocks(100, 16)
    assert ours._prompts["long"].freed_blocks == (100 - W) // 16
    assert ours._prompts["short"].compact_blocks == ours._prompts["short"].freed_blocks == 0


# vLLM's scheduler

P, BLOCKS, MAX_LEN, MAX_SEQS, STEP_TOKENS, DRAFTS = 16, 52, 400, 24, 120, 3
JUNK = -7


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = tiny.text_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    load_general_plugins()
    settings = {
        "budget": FIRST_PRUNED,
        "window": W,
        "profile": tiny.skewed_profile().model_dump(mode="json"),
    }
    init_none_hash(sha256)
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        attention_backend="SPARSEMM",
        additional_config={"sparsemm": settings},
        dtype="float32",
        block_size=P,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=True,
    ).create_engine_config()


def make_scheduler(vllm_config, scheduler_class, drafts):
    layout = build_layout(
        vllm_config, Settings.from_additional_config(vllm_config.additional_config)
    )
    assert len({row for row in layout.capacities}) == tiny.LAYERS
    spec = SparseMMSpec(
        block_size=P,
        num_kv_heads=tiny.KV_HEADS,
        head_size=tiny.HEAD_SIZE,
        dtype=torch.float32,
        layout=layout,
    )
    vllm_config.cache_config.num_gpu_blocks = BLOCKS
    names = [f"model.layers.{i}.self_attn.attn" for i in range(tiny.LAYERS)]
    scheduler = scheduler_class(
        vllm_config,
        KVCacheConfig(
            num_blocks=BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(names, spec)],
        ),
        StructuredOutputManager(vllm_config),
        block_size=P,
    )
    scheduler.num_spec_tokens = drafts
    return scheduler, layout


class Chat:
    """A request whose answer is known beforehand, and what the cache must hold for each token.

    The value of a token is a hash of all tokens up to it, as its keys and values depend on them;
    answers to a pruned prompt are private to the chat.
    """

    def __init__(self, index, prompt, answer_tokens, layout):
        self.name, self.n = f"chat-{index}", len(prompt)
        self.answer_tokens = answer_tokens
        self.tokens = [*prompt, *((31 * index + i) % 97 for i in range(answer_tokens + DRAFTS + 1))]
        self.pruned = layout.is_pruned(self.n)
        self.N, self.C = -(-self.n // P), layout.compact_blocks(self.n, P)
        values, value = [], 0
        for position, token in enumerate(self.tokens):
            value = hash((value, token))
            private = self.pruned and position >= self.n
            values.append(hash((index, position)) if private else value)
        self.values = np.array(values)
        self.compact_value = hash(("compact", index))

    def request(self):
        return Request(
            request_id=self.name,
            prompt_token_ids=self.tokens[: self.n],
            sampling_params=SamplingParams(max_tokens=self.answer_tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=get_request_block_hasher(P, sha256),
        )


class Worker:
    """Follows the block tables that the scheduler sends; a token's KV is one number."""

    def __init__(self, rng):
        self.memory = np.full((BLOCKS, P), JUNK)
        self.rows, self.rng = {}, rng

    def slots(self, chat, positions):
        entry = positions // P
        if chat.pruned:
            entry = np.where(entry < chat.N, entry, entry + chat.C)
        return np.array(self.rows[chat.name])[entry], positions % P

    def execute(self, output, spans, chats):
        """Write all tokens, attend, compact: the order inside a forward pass."""
        for new in output.scheduled_new_reqs:
            self.rows[new.req_id] = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            assert name not in cached.resumed_req_ids
            if blocks is not None:
                self.rows[name].extend(blocks[0])
        sampled = {}
        for name, (start, end, samples) in spans.items():
            chat = chats[name]
            drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
            accepted = self.rng.randint(0, drafts)
            values = chat.values[start:end].copy()
            if drafts:
                values[1 + accepted :] = JUNK
            self.memory[self.slots(chat, np.arange(start, end))] = values
            first = end - drafts
            sampled[name] = chat.tokens[first : first + accepted + 1] if samples else []
        for name, (start, end, _) in spans.items():
            self.attend(chats[name], start, end)
        for name, (start, end, _) in spans.items():
            chat = chats[name]
            if chat.pruned and end == chat.n:
                assert end - start >= W, "the prune step holds the window queries"
                self.memory[self.rows[name][chat.N : chat.N + chat.C]] = chat.compact_value
        return sampled

    def attend(self, chat, start, end):
        first = 0
        if chat.pruned and start >= chat.n:
            compact = self.memory[self.rows[chat.name][chat.N : chat.N + chat.C]]
            assert len(compact) == chat.C > 0
            assert (compact == chat.compact_value).all(), "head pages of another request"
            first = chat.n - W
        elif chat.pruned:
            assert end == chat.n or end <= chat.n - W, "a chunk that cuts the window"
        past = np.arange(first, start + 1)
        found = self.memory[self.slots(chat, past)]
        np.testing.assert_array_equal(found, chat.values[past])


class Server:
    """The engine's loop, some steps ahead of the worker."""

    def __init__(self, scheduler, layout, ahead, drafts, seed):
        self.scheduler, self.layout = scheduler, layout
        self.ahead, self.drafts = ahead, drafts
        self.rng = random.Random(seed)
        self.worker = Worker(self.rng)
        self.chats, self.answers, self.aborted = {}, {}, set()
        self.steps = deque()
        self.seen = Counter()

    def add(self):
        """A new chat, one that shares a prefix, or the next turn of an earlier one."""
        index, kind = len(self.chats), self.rng.random()
        prompt = [self.rng.randrange(1000) for _ in range(self.rng.choice([1, 9, 23, 24, 31, 32]))]
        if kind < 0.5:
            family = self.rng.randrange(3)
            shared = self.rng.choice([15, 16, 17, 64, 100, 200])
            prompt = [5000 + 300 * family + i for i in range(shared)] + prompt
        elif kind < 0.8 and self.chats:
            earlier = self.rng.choice(list(self.chats.values()))
            prompt = (earlier.tokens[: earlier.n + earlier.answer_tokens] + prompt)[:300]
        chat = Chat(index, prompt, self.rng.randint(1, 60), self.layout)
        self.chats[chat.name], self.answers[chat.name] = chat, []
        self.scheduler.add_request(chat.request())

    def schedule(self):
        scheduler = self.scheduler
        tight = self.rng.random() < 0.3  # steps in which the window may not fit
        scheduler.max_num_scheduled_tokens = self.rng.randint(1 if tight else 60, STEP_TOKENS)
        preempted = {name: r.num_preemptions for name, r in scheduler.requests.items()}
        output = scheduler.schedule()
        spans = {}
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            end = request.num_computed_tokens
            spans[name] = (end - count, end, not request.is_prefill_chunk)
        for name, request in scheduler.requests.items():
            self.seen["preempted"] += request.num_preemptions > preempted[name]
        for new in output.scheduled_new_reqs:
            self.seen["hits"] += new.num_computed_tokens > 0
        self.seen["chunks"] += sum(end < self.chats[r].n for r, (_, end, _) in spans.items())
        self.steps.append((output, spans))
        return bool(spans)

    def update(self):
        output, spans = self.steps.popleft()
        sampled = self.worker.execute(output, spans, self.chats)
        names = list(spans)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
        )
        engine_outputs = self.scheduler.update_from_output(output, result)
        for client in engine_outputs.values():
            for answer in client.outputs:
                self.answers[answer.request_id] += answer.new_token_ids
        if self.drafts:
            running = [r.request_id for r in self.scheduler.running if not r.is_prefill_chunk]
            proposed = [[1] * self.rng.randint(0, self.drafts) for _ in running]
            self.scheduler.update_draft_token_ids(DraftTokenIds(running, proposed))

    def check(self):
        pool = self.scheduler.kv_cache_manager.block_pool
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        owners = Counter(
            block.block_id
            for row in manager.req_to_blocks.values()
            for block in row
            if not block.is_null
        )
        assert pool.get_num_free_blocks() + len(owners) + 1 == BLOCKS
        assert all(pool.blocks[block].ref_cnt == count for block, count in owners.items())

    def run(self, chats):
        idle = 0
        while self.scheduler.has_unfinished_requests() or len(self.chats) < chats or self.steps:
            while len(self.chats) < chats and self.rng.random() < 0.7:
                self.add()
            progress = self.schedule()
            self.check()
            while len(self.steps) > (self.ahead if progress else 0):
                self.update()
                self.check()
            if self.rng.random() < 0.03 and self.scheduler.requests:
                victim = self.rng.choice(list(self.scheduler.requests))
                self.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
                self.aborted.add(victim)
                self.check()
            idle = 0 if progress else idle + 1
            assert idle < 50, "nothing can be scheduled any more"


@pytest.mark.parametrize(
    ("scheduler_class", "ahead", "drafts"),
    [(Scheduler, 0, 0), (AsyncScheduler, 1, 0), (Scheduler, 0, DRAFTS)],
    ids=["sync", "async", "speculation"],
)
def test_many_requests_under_vllms_scheduler(vllm_config, scheduler_class, ahead, drafts):
    """Chunked, cached, preempted, aborted: all finish, read what they wrote, and free all."""
    scheduler, layout = make_scheduler(vllm_config, scheduler_class, drafts)
    server = Server(scheduler, layout, ahead, drafts, seed=5)
    server.run(chats=400)
    for name, chat in server.chats.items():
        if name not in server.aborted:
            assert server.answers[name] == chat.tokens[chat.n : chat.n + chat.answer_tokens]
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    assert not manager._prompts
    # Without these the run would prove little.
    pruned = [chat.pruned for chat in server.chats.values()]
    assert 40 < sum(pruned) < len(pruned) - 40
    assert server.seen["preempted"] > 20
    assert server.seen["hits"] > 40
    assert server.seen["chunks"] > 200
    assert server.aborted
