"""An engine core, its device and its clients: the loop that drives them."""

import copy
import pickle
import random
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.engine import FinishReason
from vllm.v1.engine.core import EngineCore

from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.scheduler.stats import Outcome
from support.simulation.device import Device, DeviceError, Step, Verified, Worker, layout_of
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
        self.chats, self.steps, self.expected = {}, deque(), {}
        self.pending_abort = None
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
        self.verified = Verified(self.worker)
        self.device = self.core.model_executor
        self._watch()
        self._remember()

    # What vLLM calls inside, seen by name.

    def _watch(self):
        """Note calls inside `schedule` and `update_from_output`."""
        scheduler, kv = self.scheduler, self.kv
        self.allocated, self.lookups = set(), {}

        def watch(holder: Any, name: str, note: Callable[..., None], before: bool = False) -> None:
            original = getattr(holder, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                if before:
                    note(*args)
                result = original(*args, **kwargs)
                if not before:
                    note(result, *args)
                return result

            setattr(holder, name, watched)

        watch(scheduler, "_preempt_request", self._on_preempt, before=True)
        watch(scheduler, "_reserve_prefill_lookahead", self._on_chunk)
        watch(kv, "allocate_slots", self._on_allocate)
        watch(kv, "get_computed_blocks", self._on_lookup, before=True)
        watch(scheduler, "update_from_output", self._on_update, before=True)
        watch(scheduler, "update_from_output", self._on_updated)

    def _on_preempt(self, request, *_):
        name = request.request_id
        in_its_step = name in self.allocated
        self.note("preempts", name, "scheduled in this step" if in_its_step else "")
        self.seen["preempted"] += 1
        self.seen["preempted in its own step"] += in_its_step
        self.seen["preempted in flight"] += self.in_flight(name)
        self.seen["preempted in its prompt"] += request.num_computed_tokens < self.chats[name].n
        self.seen["preempted in its prune step"] += self.is_in_prune_step(name)

    def _on_chunk(self, tokens, request, computed, asked, *_):
        self.seen["window did not fit"] += tokens == 0 < asked

    def _on_allocate(self, blocks, request, *_):
        if blocks is not None:
            self.allocated.add(request.request_id)

    def _on_lookup(self, request, *_):
        found = self.kv.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        self.lookups[request.request_id] = found[1]

    def _on_update(self, output, *_):
        assert output is self.steps[0].output, "steps are processed in their order"
        self.alive = set(self.scheduler.requests)
        for name in self.steps.popleft().reads:
            request = self.scheduler.requests.get(name)
            if request is not None and request.num_stale_output_tokens:
                what = "dropped" if request.drop_stale_output else "delivered"
                self.seen[f"outputs from before a preemption {what}"] += 1

    def _on_updated(self, _, output, *__):
        finished = self.alive - set(self.scheduler.requests)
        self.seen["finished in flight"] += sum(map(self.in_flight, finished))
        self._remember()

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
            promised = self.promised[block.block_id]
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
        self.allocated.clear()
        self.check(executing=step)
        self.interrupt("when a step is sent")
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
            prompt.outcome is Outcome.PRUNED and hit <= chat.n - W < self.lookups[name]
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

    def interrupt(self, where):
        """A client's abort arrives in another thread, whatever the engine does."""
        alive = list(self.scheduler.requests) if self.pending_abort is None else []
        if alive and self.rng.random() < self.scenario.faulty:
            self.pending_abort = self.rng.choice(alive)
            self._note_abort(self.pending_abort, where)
            self.core.aborts_queue.put_nowait([self.pending_abort])

    def _note_abort(self, name, where):
        self.note("aborts", name, where)
        self.chats[name].aborted = True
        request = self.scheduler.requests.get(name)
        if request is not None:
            self.seen[f"aborted {where}"] += 1
            self.seen["aborted in flight"] += self.in_flight(name)
            self.seen["aborted in its prune step"] += self.is_in_prune_step(name)
            self.seen["aborted before its first step"] += name not in self.manager.prompts

    # Invariants.

    def _remember(self):
        """Hashes in the prefix cache when the engine schedules next."""
        self.promised = [block.block_hash for block in self.pool.blocks]

    def check(self, executing=None):
        """What holds after every call."""
        owners = Counter(
            block.block_id
            for manager in self.managers
            for row in manager.req_to_blocks.values()
            for block in row
            if not block.is_null
        )
        held = self.withheld + len(owners)
        assert self.pool.get_num_free_blocks() + held + 1 == self.blocks
        assert all(self.pool.blocks[block].ref_cnt == count for block, count in owners.items())
        for step in self.steps:
            for name, blocks in step.reads.items():
                request = self.scheduler.requests.get(name)
                if request is not None and request.num_preemptions == step.preemptions[name]:
                    assert all(block.ref_cnt for block in blocks), "freed while a step reads it"
        for name, prompt in self.manager.prompts.items():
            if prompt.compact_blocks:
                own = self.manager.req_to_blocks.get(name, [])[-(-prompt.tokens // P) :]
                assert all(b.ref_cnt == 1 and b.block_hash is None for b in own), "not private"
                request = self.scheduler.requests[name]
                processed = request.num_computed_tokens - request.num_in_flight_tokens
                if processed >= prompt.tokens and own:
                    older = self.manager.req_to_blocks[name][: prompt.freed_blocks]
                    assert all(block.is_null for block in older), "pruned and not freed"
        self._check_prefix_cache(executing)
        self._check_encoder_cache(executing)

    def _check_prefix_cache(self, executing):
        """Every block holds what its hash promises, or a step that will write it was sent."""
        sent = [*self.device.queue, *([executing] if executing else [])]
        writes = set().union(*(step.writes for step in sent))
        for block in self.pool.blocks:
            if block.block_hash is None or block.block_id in writes:
                continue
            if self.verified.get(block.block_id) is block.block_hash:
                continue
            chat, i = self._promise(get_block_hash(block.block_hash))
            group = get_group_id(block.block_hash)
            expected = chat.dense_values[P * i : P * (i + 1)] ^ group
            wrong = np.flatnonzero(self.worker.memory[block.block_id] != expected)
            assert not wrong.size, (
                f"block {block.block_id} of group {group} is in the prefix cache as [{P * i}, "
                f"{P * (i + 1)}) of {chat.name} or another; it has not the right content from "
                f"{P * i + wrong[0]} on, and no step that would compute it was sent"
            )
            self.verified[block.block_id] = block.block_hash

    def _promise(self, block_hash):
        """A chat whose tokens the hash means, and which block of them."""
        if block_hash not in self.expected:
            for chat in self.chats.values():
                for i, known in enumerate(chat.request.block_hashes):
                    self.expected[known] = chat, i
        return self.expected[block_hash]

    def _check_encoder_cache(self, executing):
        """The device has every picture that the scheduler believes it has."""
        has = set(self.worker.encoder)
        for step in [*self.device.queue, *([executing] if executing else [])]:
            has -= set(step.output.free_encoder_mm_hashes)
            for name, numbers in step.output.scheduled_encoder_inputs.items():
                has |= {f"picture-{self.chats[name].pictures[i][1]}" for i in numbers}
        cache_manager = self.scheduler.encoder_cache_manager
        missing = set(cache_manager.cached) - has
        assert not missing, f"{missing}: in the encoder cache, and no step computes it"
        assert has <= set(cache_manager.cached) | set(cache_manager.freed), "never freed"

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

    def act(self):
        """Whatever clients and operators do between two steps."""
        if self.pending_abort is not None:  # vLLM gets it a second time, among the other requests
            self.core.abort_requests([self.pending_abort])
            self.pending_abort = None
            self._remember()
        rng, faulty = self.rng, self.scenario.faulty
        alive = list(self.scheduler.requests)
        if alive and rng.random() < faulty:
            name = rng.choice(alive)
            self._note_abort(name, "between steps")
            self.core.abort_requests([name])
        if alive and rng.random() < faulty / 2:
            self._add_twice(rng.choice(alive))
        if rng.random() < faulty / 2:
            self._reset()
        if rng.random() < faulty / 3:
            self._pause()
        self._remember()
        self.check()

    def _add_twice(self, name):
        """A second request of the same name is refused, and the first one does not notice."""
        if name not in self.scheduler.requests:
            return
        self.note("adds", name, "again")
        twin, wave = self.core.preprocess_add_request(self.chats[name].engine_request())
        with pytest.raises(AssertionError, match="duplicate request id"):
            self.core.add_request(twin, wave)
        self.seen["duplicates refused"] += 1

    def _reset(self):
        kind = self.rng.choice(["prefix cache", "running requests", "encoder cache", "all"])
        self.note("resets", kind)
        self.seen[f"reset of {kind} in flight"] += bool(self.steps)
        if kind in ("prefix cache", "running requests"):
            done = self.core.reset_prefix_cache(reset_running_requests=kind != "prefix cache")
            assert done or kind == "prefix cache"
            self.seen["reset refused while requests run"] += not done
        elif kind == "encoder cache":
            self.core.reset_encoder_cache()
        else:
            self.core._reset_caches()

    def _pause(self):
        """Pause or sleep, add requests meanwhile, and go on."""
        mode, sleeps = self.rng.choice(["abort", "keep"]), self.rng.random() < 0.5
        self.note("pauses", mode, "and sleeps" if sleeps else "")
        self.seen[f"paused to {mode} in flight"] += bool(self.steps)
        if mode == "abort":
            for name in self.scheduler.requests:
                self._note_abort(name, "by a pause")
        if sleeps:
            self.core.sleep(level=1, mode=mode)
        else:
            self.core.pause_scheduler(mode=mode, clear_cache=self.rng.random() < 0.5)
        self._remember()
        self.check()
        for _ in range(self.rng.randrange(3)):
            self.add()
            self.advance()
        if sleeps:
            self.core.wake_up()
        else:
            self.core.resume_scheduler()

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
        self._remember()
        self.check()
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
                        self._note_abort(name, "when another was added")
                        self.core.abort_requests([name])
            self.act()
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
