"""vLLM's real schedulers with many requests, some steps ahead of a worker that checks every read.

The worker keeps one number for each token's KV and executes the steps in their order, as a GPU
does. Blocks of a request that goes on must not be free while a step in flight reads them, even if
nobody has written to them yet.
"""

import pickle
import random
from collections import Counter, deque
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from sparsemm_vllm import patches
from sparsemm_vllm.kv_cache import SparseMMSpec
from sparsemm_vllm.request_settings import request_layout
from sparsemm_vllm.request_stats import Outcome
from sparsemm_vllm.settings import Settings
from sparsemm_vllm.support import build_layout

W, BASE = 8, 16
FIRST_PRUNED = W + BASE
P, BLOCKS, MAX_LEN, MAX_SEQS, STEP_TOKENS, DRAFTS = 16, 52, 400, 24, 120, 3
JUNK, STOP = -7, 99
AHEAD = 3  # steps in flight at most
ASKED = [None] * 4 + [{"sparsemm": 0}, {"sparsemm_budget": W + 2}, {"sparsemm_budget": 48}]


@pytest.fixture(scope="module", autouse=True)
def installed():
    patches.install()


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


def make_scheduler(vllm_config, scheduler_class, drafts, share=None):
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
        prune_when_free_below=share,
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

    def __init__(self, index, prompt, answer_tokens, asked, stops):
        self.index, self.name, self.n = index, f"chat-{index}", len(prompt)
        self.answer_tokens, self.asked = answer_tokens, asked
        further = answer_tokens + (AHEAD + 2) * (DRAFTS + 1)  # steps in flight may sample more
        self.tokens = [*prompt, *((31 * index + i) % 97 for i in range(further))]
        self.max_tokens = answer_tokens
        if stops:  # at a token that the scheduler does not foresee
            self.max_tokens += 15
            self.tokens[self.n + answer_tokens - 1] = STOP
        self.compact_value = hash(("compact", index))
        self.layout = None

    def use(self, layout):
        """Its layout, known from its admission on, stays what it is."""
        assert self.layout in (None, layout), "a resumed request is pruned in another way"
        self.layout, self.pruned = layout, layout.is_pruned(self.n)
        self.N, self.C = -(-self.n // P), layout.compact_blocks(self.n, P)
        values, value = [], 0
        for position, token in enumerate(self.tokens):
            value = hash((value, token))
            private = self.pruned and position >= self.n
            values.append(hash((self.index, position)) if private else value)
        self.values = np.array(values)

    def request(self):
        return Request(
            request_id=self.name,
            prompt_token_ids=self.tokens[: self.n],
            sampling_params=SamplingParams(
                max_tokens=self.max_tokens, stop_token_ids=[STOP], extra_args=self.asked
            ),
            pooling_params=None,
            block_hasher=get_request_block_hasher(P, sha256),
        )


@dataclass
class InFlight:
    """A step that is scheduled and not processed.

    Attributes:
        output: of the scheduler; new requests as a worker in another process gets them.
        samples: the requests that sample in it.
        reads: blocks that each request reads or writes in it.
        preemptions: of each request when it was scheduled.
    """

    output: object
    samples: set
    reads: dict = field(default_factory=dict)
    preemptions: dict = field(default_factory=dict)


class Worker:
    """Follows the block tables that the scheduler sends, and knows which drafts were accepted."""

    def __init__(self, rng, layout):
        self.memory = np.full((BLOCKS, P), JUNK)
        self.rows, self.computed = {}, {}
        self.rng, self.layout = rng, layout

    def slots(self, chat, positions):
        entry = positions // P
        if chat.pruned:
            entry = np.where(entry < chat.N, entry, entry + chat.C)
        return np.array(self.rows[chat.name])[entry], positions % P

    def enter(self, output, chats):
        """Rows and layouts of the requests."""
        for new in output.scheduled_new_reqs:
            self.rows[new.req_id] = list(new.block_ids[0])
            self.computed[new.req_id] = new.num_computed_tokens
            chats[new.req_id].use(request_layout(self.layout, new.sampling_params.extra_args))
        cached = output.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            assert name not in cached.resumed_req_ids
            if blocks is not None:
                self.rows[name].extend(blocks[0])

    def execute(self, step, chats):
        """Write all tokens, attend, compact: the order inside a forward pass."""
        output = step.output
        self.enter(output, chats)
        sampled, spans = {}, {}
        for name, count in output.num_scheduled_tokens.items():
            chat, start = chats[name], self.computed[name]
            end, drafts = start + count, len(output.scheduled_spec_decode_tokens.get(name, ()))
            accepted = self.rng.randint(0, drafts)
            values = chat.values[start:end].copy()
            if drafts:
                values[1 + accepted :] = JUNK
            self.memory[self.slots(chat, np.arange(start, end))] = values
            first = end - drafts
            sampled[name] = (
                chat.tokens[first : first + accepted + 1] if name in step.samples else []
            )
            self.computed[name] = end - drafts + accepted
            spans[name] = chat, start, end
        for chat, start, end in spans.values():
            self.attend(chat, start, end)
        for chat, start, end in spans.values():
            if chat.pruned and end == chat.n:
                assert end - start >= W, "the prune step holds the window queries"
                self.memory[self.rows[chat.name][chat.N : chat.N + chat.C]] = chat.compact_value
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
        self.scheduler, self.ahead, self.drafts = scheduler, ahead, drafts
        self.asynchronous = isinstance(scheduler, AsyncScheduler)
        self.rng = random.Random(seed)
        self.worker = Worker(self.rng, layout)
        self.chats, self.answers, self.aborted = {}, {}, set()
        self.steps = deque()
        self.seen = Counter()

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def manager(self):
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return manager

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
        asked, stops = self.rng.choice(ASKED), self.rng.random() < 0.5
        chat = Chat(index, prompt, self.rng.randint(1, 60), asked, stops)
        self.chats[chat.name], self.answers[chat.name] = chat, []
        self.scheduler.add_request(chat.request())

    def schedule(self):
        scheduler = self.scheduler
        tight = self.rng.random() < 0.3  # steps in which the window may not fit
        scheduler.max_num_scheduled_tokens = self.rng.randint(1 if tight else 60, STEP_TOKENS)
        preempted = {name: r.num_preemptions for name, r in scheduler.requests.items()}
        in_flight = {name for step in self.steps for name in step.reads}
        output = scheduler.schedule()
        for name, request in scheduler.requests.items():
            if request.num_preemptions > preempted[name]:
                self.seen["preempted"] += 1
                self.seen["preempted in flight"] += name in in_flight
        output.scheduled_new_reqs = [self._sent(new) for new in output.scheduled_new_reqs]
        step = InFlight(output, set())
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            if not request.is_prefill_chunk:
                step.samples.add(name)
            step.preemptions[name] = request.num_preemptions
            end = request.num_computed_tokens
            step.reads[name] = self._reads(name, end - count)
            self.seen["chunks"] += end < request.num_prompt_tokens
        self.steps.append(step)
        return bool(step.reads)

    def _sent(self, new: NewRequestData):
        """As it arrives in a worker: what is decided later changes nothing."""
        self.seen["hits"] += new.num_computed_tokens > 0
        new = copy(new)
        new.sampling_params = pickle.loads(pickle.dumps(new.sampling_params))
        prompt = self.manager.prompts[new.req_id]
        layout = request_layout(self.manager.layout, new.sampling_params.extra_args)
        assert prompt.layout == layout
        self.seen[prompt.outcome] += 1
        return new

    def _reads(self, name, start):
        """Blocks that a step needs until it has been processed."""
        prompt, row = self.manager.prompts[name], self.manager.req_to_blocks[name]
        first = prompt.freed_blocks if start >= prompt.tokens else 0
        assert not any(block.is_null for block in row[first:])
        return row[first:]

    def update(self):
        step = self.steps.popleft()
        sampled = self.worker.execute(step, self.chats)
        names = list(step.reads)
        for name, drafts in step.output.scheduled_spec_decode_tokens.items():
            start = self.worker.computed[name] - len(sampled[name])
            rejected = name in step.samples and len(sampled[name]) <= len(drafts)
            self.seen["rejected"] += rejected
            self.seen["rejected behind the prompt"] += rejected and start == self.chats[name].n
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
        )
        running = set(self.scheduler.requests)
        engine_outputs = self.scheduler.update_from_output(step.output, result)
        for client in engine_outputs.values():
            for answer in client.outputs:
                self.answers[answer.request_id] += answer.new_token_ids
        self._count_in_flight("finished", running - set(self.scheduler.requests))
        if self.drafts and not self.asynchronous:
            running = [r.request_id for r in self.scheduler.running if not r.is_prefill_chunk]
            proposed = [[1] * self.rng.randint(0, self.drafts) for _ in running]
            self.scheduler.update_draft_token_ids(DraftTokenIds(running, proposed))

    def _count_in_flight(self, what, names):
        in_flight = {name for step in self.steps for name in step.reads}
        self.seen[f"{what} in flight"] += len(names & in_flight)

    def abort(self):
        victim = self.rng.choice(list(self.scheduler.requests))
        self.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        self.aborted.add(victim)
        self._count_in_flight("aborted", {victim})

    def check(self):
        owners = Counter(
            block.block_id
            for row in self.manager.req_to_blocks.values()
            for block in row
            if not block.is_null
        )
        assert self.pool.get_num_free_blocks() + len(owners) + 1 == BLOCKS
        assert all(self.pool.blocks[block].ref_cnt == count for block, count in owners.items())
        for step in self.steps:
            for name, blocks in step.reads.items():
                request = self.scheduler.requests.get(name)
                if request is not None and request.num_preemptions == step.preemptions[name]:
                    assert all(block.ref_cnt for block in blocks), "freed while a step reads it"

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
            if self.rng.random() < 0.08 and self.scheduler.requests:
                self.abort()
                self.check()
            idle = 0 if progress else idle + 1
            assert idle < 50, "nothing can be scheduled any more"

    def finish(self):
        """All chats had their answers, and nothing is left of them."""
        for name, chat in self.chats.items():
            if name not in self.aborted:
                assert self.answers[name] == chat.tokens[chat.n : chat.n + chat.answer_tokens]
        assert self.pool.get_num_free_blocks() == BLOCKS - 1
        assert not self.manager.prompts
        assert self.aborted


@pytest.mark.parametrize(
    ("scheduler_class", "ahead", "drafts", "chats"),
    [
        (Scheduler, 0, 0, 300),
        (Scheduler, 0, DRAFTS, 300),
        (AsyncScheduler, 1, 0, 300),
        (AsyncScheduler, 1, DRAFTS, 300),
        (AsyncScheduler, 2, DRAFTS, 200),
        (AsyncScheduler, 3, 0, 200),
        (AsyncScheduler, 3, DRAFTS, 200),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_many_requests_under_vllms_scheduler(vllm_config, scheduler_class, ahead, drafts, chats):
    """Chunked, cached, preempted, aborted: all finish, read what they wrote, and free all."""
    scheduler, layout = make_scheduler(vllm_config, scheduler_class, drafts)
    server = Server(scheduler, layout, ahead, drafts, seed=5)
    server.run(chats)
    server.finish()
    # Without these the run would prove little.
    seen = server.seen
    assert min(seen[o] for o in Outcome if o is not Outcome.POOL_AMPLE) > 10, seen
    assert seen["preempted"] > 10
    assert seen["hits"] > 40
    assert seen["chunks"] > 100
    if ahead:
        for what in ("aborted in flight", "preempted in flight", "finished in flight"):
            assert seen[what] > 2, seen
    if drafts:
        assert seen["rejected"] > 200
        assert seen["rejected behind the prompt"] > 10, seen


@pytest.mark.parametrize(("scheduler_class", "ahead"), [(Scheduler, 0), (AsyncScheduler, 2)])
def test_prompts_stay_whole_while_the_pool_is_ample(vllm_config, scheduler_class, ahead):
    """Decided once for each request, and known to the workers, also when it is resumed."""
    scheduler, layout = make_scheduler(vllm_config, scheduler_class, 0, share=0.2)
    server = Server(scheduler, layout, ahead, 0, seed=6)
    server.run(chats=200)
    server.finish()
    assert min(server.seen[outcome] for outcome in Outcome) > 10, server.seen
    assert server.seen["preempted"] > 10


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_active_seqs": 5},
        {"prefill_schedule_interval": 3},
        {"long_prefill_token_threshold": W + 1, "long_prefill_token_threshold_adaptive": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_hold_prompts_back(vllm_config, monkeypatch, options):
    """Fewer requests at once, prompts in some steps only, chunks that are hardly a window."""
    for name, value in options.items():
        monkeypatch.setattr(vllm_config.scheduler_config, name, value)
    scheduler, layout = make_scheduler(vllm_config, Scheduler, 0)
    server = Server(scheduler, layout, 0, 0, seed=8)
    server.run(chats=120)
    server.finish()
    assert server.seen["chunks"] > 30
