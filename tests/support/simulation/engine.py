"""An engine core, its device and its clients: the loop that drives them."""

import copy
import pickle
import random
from collections import Counter, deque
from functools import partial
from unittest import mock

from vllm.v1.engine import FinishReason
from vllm.v1.engine.core import EngineCore

from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.scheduler.stats import Outcome
from support.simulation.device import Device, DeviceError, Step, Worker, layout_of
from support.simulation.faults import Faults
from support.simulation.invariants import Invariants
from support.simulation.scenario import (
    SLIDING,
    STEP_TOKENS,
    P,
    Scenario,
    W,
    layer_specs,
    least_blocks,
    make_config,
)
from support.simulation.traffic import PICTURES, any_chat
from support.simulation.watch import Watch

REPLAY = "tests/engine/scheduler/test_simulation.py -k test_any_seed"
PATIENCE = 400  # calls of the engine without any progress
# Collection of garbage takes longer than all steps of so small an engine; vLLM's environment must
# stay as later tests of this process set it.
ALONE_IN_ITS_PROCESS = mock.patch.multiple(
    "vllm.v1.engine.core",
    freeze_gc_heap=mock.DEFAULT,
    cleanup_dist_env_and_memory=mock.DEFAULT,
    enable_envs_cache=mock.DEFAULT,
)


class Simulation:
    """An engine core, its device and its clients; all follows from the seed.

    Args:
        seed: seed of traffic, faults and order.
        scenario: settings that the engine is started with; by the seed if not given.
        traffic: function that makes the next chat, of the simulation; `any_chat` if not given.
        withheld: blocks that nobody may use: of a pool in which vLLM would refuse to start.
    """

    def __init__(self, seed, scenario=None, traffic=None, withheld=0):
        self.seed = seed
        self.scenario = scenario or Scenario.of_seed(seed)
        self.traffic = traffic or any_chat
        self.rng = random.Random(seed)
        self.seen = Counter()
        self.events = deque(maxlen=30)
        self.chats, self.steps = {}, deque()
        self.running = []  # requests, in each step that computes anything
        self.calls = self.quiet = self.last_call = 0
        config = make_config(self.scenario)
        specs = layer_specs(config, self.scenario.share)
        self.blocks = least_blocks(config, specs) + self.scenario.spare
        config.cache_config.num_gpu_blocks_override = self.blocks
        with ALONE_IN_ITS_PROCESS:
            self.core = EngineCore(config, partial(Device, self), log_stats=True)
        if self.scenario.queue is not None:
            self.core.batch_queue_size = self.scenario.queue
            self.core.batch_queue = deque(maxlen=self.scenario.queue)
        self.scheduler = self.core.scheduler
        self.kv = self.scheduler.kv_cache_manager
        self.pool = self.kv.block_pool
        self.managers = self.kv.coordinator.single_type_managers
        (self.manager,) = (m for m in self.managers if isinstance(m, SparseMMManager))
        assert self.pool.num_gpu_blocks == self.blocks
        self.withheld = len(self.pool.get_new_blocks(withheld))
        encoder = self.scheduler.encoder_cache_manager
        size, self.scheduler.max_num_encoder_input_tokens = self.scenario.encoder
        self.scheduler.encoder_cache_manager = type(encoder)(cache_size=size)
        self.worker = Worker(
            self.blocks,
            self.manager,
            [m is self.manager for m in self.managers],
            random.Random(seed + 1),
            self.chats,
            self.seen,
        )
        self.device = self.core.model_executor
        self.watch, self.faults = Watch(self), Faults(self)
        self.invariants = Invariants(self)

    def note(self, *words):
        self.events.append(f"{self.calls}: " + " ".join(str(word) for word in words))

    def in_flight(self, name):
        return any(name in step.reads for step in self.steps)

    def is_in_prune_step(self, name):
        """Whether the step that ends its prompt is scheduled and not processed."""
        prompt, request = self.manager.prompts.get(name), self.scheduler.requests[name]
        if prompt is None or not prompt.compact_blocks:
            return False
        processed = request.num_computed_tokens - request.num_in_flight_tokens
        return processed < prompt.tokens <= request.num_computed_tokens

    # What the device asks for.

    def dispatch(self, output):
        """The step that was scheduled, with what it reads."""
        if self.scheduler.encoder_cache_manager.cache_size > self.scenario.encoder[0]:
            self.seen["encoder cache got room for a window"] += 1
        step = Step(output, [self._sent(new) for new in output.scheduled_new_reqs])
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            step.preemptions[name] = request.num_preemptions
            start = request.num_computed_tokens - count
            step.reads[name] = self._reads(name, start)
            step.writes.update(self._writes(name))
            end = request.num_computed_tokens
            self.seen["chunks"] += end < request.num_prompt_tokens
            self.seen["chunks that end in a picture"] += any(
                first < end < first + PICTURES[number]
                for first, number in self.chats[name].pictures
            )
        for block in self.pool.blocks:
            promised = self.invariants.promised[block.block_id]
            if promised is not None and promised is block.block_hash:
                step.sealed[block.block_id] = promised
        if step.reads:
            self.running.append(len(self.scheduler.running))
        self.seen["empty steps"] += not step.reads
        step.fails = self.scenario.fails_at == self.calls
        self.steps.append(step)
        self.note("schedules", dict(output.num_scheduled_tokens), output.scheduled_encoder_inputs)
        self.seen["full pool, one request"] += (
            len(self.scheduler.running) == 1 and not self.pool.get_num_free_blocks()
        )
        self.watch.allocated.clear()
        self.invariants.check(executing=step)
        self.faults.interrupt("when a step is sent")
        return step

    def _sent(self, new):
        """As it arrives in a worker: what is decided later changes nothing."""
        name, chat = new.req_id, self.chats[new.req_id]
        request, hit = self.scheduler.requests[name], new.num_computed_tokens
        new = copy.copy(new)
        new.prefill_token_ids = list(new.prefill_token_ids)
        new.sampling_params = pickle.loads(pickle.dumps(new.sampling_params))
        prompt = self.manager.prompts[name]
        assert prompt.layout == layout_of(new, self.manager)
        self.seen[prompt.outcome] += 1
        self.seen["hits"] += hit > 0
        self.seen["hits cut before the window"] += (
            prompt.outcome is Outcome.PRUNED and hit <= chat.n - W < self.watch.lookups[name]
        )
        self.seen["resumed from its own prompt"] += request.num_preemptions > 0 and hit > 0
        row = self.manager.req_to_blocks[name]
        hits = row[: hit // P]
        self.seen["hits on what another holds"] += any(b.ref_cnt > 1 for b in hits)
        self.seen["hits on what is being computed"] += any(
            block.block_id in step.writes for block in hits for step in self.steps
        )
        return new

    def _reads(self, name, start):
        """Blocks that a step needs until it has been processed."""
        found = []
        for manager in self.managers:
            row = manager.req_to_blocks[name]
            if manager is self.manager:
                prompt = manager.prompts[name]
                first = prompt.freed_blocks if start >= prompt.tokens else 0
            else:
                first = max(0, start - SLIDING + 1) // P
            assert not any(block.is_null for block in row[first:])
            found += row[first:]
        return found

    def _writes(self, name):
        """Blocks of tokens that are scheduled and not processed: drafts may be rejected yet."""
        request = self.scheduler.requests[name]
        end = request.num_computed_tokens
        start = end - (request.num_in_flight_tokens - request.num_stale_output_tokens)
        for manager in self.managers:
            shift = 0
            if manager is self.manager and end > manager.prompts[name].tokens:
                shift = manager.prompts[name].compact_blocks
            for block in manager.req_to_blocks[name][start // P : -(-end // P) + shift]:
                yield block.block_id

    # Clients.

    def add(self):
        """The next chat."""
        self.enter(self.traffic(self))

    def enter(self, chat):
        """Let a client send a chat."""
        self.chats[chat.name] = chat
        chat.request, wave = self.core.preprocess_add_request(chat.engine_request())
        self.note("adds", chat.name, chat.n, "+", chat.answer_tokens, chat.asked, chat.pictures)
        self.core.add_request(chat.request, wave)
        self.seen["one-token answers"] += chat.max_tokens == 1
        self.seen["prompts that end a block"] += chat.n % P == 0

    def advance(self):
        """A call of the engine, if it has anything to do."""
        if not self.scheduler.has_requests() and not self.core.batch_queue:
            return
        rng, scheduler = self.rng, self.scheduler
        if self.scenario.faulty and self.calls < self.last_call:
            tight = rng.random() < 0.3  # steps in which the window may not fit
            scheduler.max_num_scheduled_tokens = rng.randint(1 if tight else 60, STEP_TOKENS)
        self.calls += 1
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        self.deliver(outputs or {})
        self.invariants.remember()
        self.invariants.check()
        self.quiet += 1
        assert self.quiet < PATIENCE, "nothing advances any more"

    def deliver(self, outputs):
        """Tokens arrive at the clients, each in its place and none after the end."""
        for output in (output for client in outputs.values() for output in client.outputs):
            chat = self.chats[output.request_id]
            assert chat.finished is None, "tokens after the end"
            chat.answer += output.new_token_ids
            answered = len(chat.answer)
            assert chat.answer == chat.tokens[chat.n : chat.n + answered], "a wrong answer"
            assert answered <= chat.answer_tokens
            chat.finished = output.finish_reason
            self.quiet = 0

    # Runs.

    def run(self, calls, at_once=None):
        """Call the engine that often, then let all requests end.

        Args:
            calls: calls with new requests and faults.
            at_once: requests that are added before the first call, none later.

        Returns:
            The simulation, whose `seen` counts what happened.
        """
        try:
            self._run(calls, at_once)
        except DeviceError:
            self.seen["device failed, engine ended"] += 1
            self.device.queue.clear()
        except Exception as error:
            error.add_note(f"{self.scenario}\n" + "\n".join(self.events))
            error.add_note(f"again: SIMULATION_SEED={self.seed} pytest {REPLAY}")
            raise
        else:
            self.finish()
        with ALONE_IN_ITS_PROCESS:
            self.core.shutdown()
        return self

    def _run(self, calls, at_once):
        self.last_call = calls
        for _ in range(at_once or 0):
            self.add()
        while self.calls < calls:
            if at_once is None and len(self.scheduler.requests) < 40:
                while self.rng.random() < 0.45:
                    self.add()
                    if self.rng.random() < self.scenario.faulty / 2:
                        name = self.rng.choice(list(self.chats))
                        self.faults.note_abort(name, "when another was added")
                        self.core.abort_requests([name])
            self.faults.act()
            self.advance()
            if not self.scheduler.has_requests() and at_once is not None:
                break
        while self.scheduler.has_requests() or self.core.batch_queue:
            self.scheduler.max_num_scheduled_tokens = STEP_TOKENS
            self.advance()

    def finish(self):
        """All chats had their answers, and nothing is left of them."""
        for chat in self.chats.values():
            if not chat.aborted:
                assert chat.finished in (FinishReason.STOP, FinishReason.LENGTH), chat.name
                assert chat.answer == chat.tokens[chat.n : chat.n + chat.answer_tokens]
        assert self.pool.get_num_free_blocks() == self.blocks - 1 - self.withheld
        assert not self.manager.prompts
        assert not self.steps
        assert not self.device.queue
        assert not self.worker.rows
        assert not self.scheduler.encoder_cache_manager.request_cached_ids
        self.seen["pictures computed again"] = sum(n - 1 for n in self.worker.encoded.values())
        for chat in self.chats.values():
            self.seen["stopped by a token"] += chat.finished is FinishReason.STOP
