"""A device that keeps one number for each token's KV, and checks what it reads."""

from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.distributed.utils import get_pp_indices
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import received
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from support.simulation.scenario import SLIDING, P, W, layer_specs
from support.simulation.traffic import PICTURES

JUNK = -7


class DeviceError(RuntimeError):
    """The device failed, as a seed wanted it to."""


@dataclass
class Step:
    """A step that is scheduled and not processed.

    Attributes:
        output: output of the scheduler.
        new: its new requests, as a worker in another process gets them.
        reads: blocks that each request reads or writes in it.
        writes: blocks that it, or an earlier step in flight, writes for its requests.
        sealed: blocks that were in the prefix cache before it was scheduled, by their hashes.
        preemptions: number of each request's preemptions when it was scheduled.
        result: result of the device, once it executed it.
    """

    output: Any
    new: list[Any]
    reads: dict[str, list[Any]] = field(default_factory=dict)
    writes: set[int] = field(default_factory=set)
    sealed: dict[int, Any] = field(default_factory=dict)
    preemptions: dict[str, int] = field(default_factory=dict)
    result: Any = None
    fails: bool = False


def layout_of(new: Any, manager: SparseMMManager) -> CacheLayout:
    """The cache layout of a new request, as a worker with the same settings finds it."""
    return received(new.sampling_params.extra_args, manager.limits).layout(manager.layout)


class Worker:
    """Follows the block tables that the scheduler sends, and knows which drafts were accepted."""

    def __init__(self, blocks, manager, groups, rng, chats, seen):
        self.memory = np.full((blocks, P), JUNK)
        self.manager, self.groups, self.rng, self.chats = manager, groups, rng, chats
        self.rows, self.computed, self.prefill, self.inputs = {}, {}, {}, {}
        self.encoder = {}
        self.encoded, self.seen = Counter(), seen
        self.written = set()
        self.drafted = None

    def slots(self, chat, group, positions):
        entry = positions // P
        if chat.pruned and self.groups[group]:
            entry = np.where(entry < chat.N, entry, entry + chat.C)
        blocks = np.array(self.rows[chat.name][group])[entry]
        assert blocks.all(), "the block that holds nothing"
        return blocks, positions % P

    def forget(self, name):
        for state in (self.rows, self.computed, self.prefill, self.inputs):
            state.pop(name, None)

    def enter(self, step):
        """Rows, layouts and pictures of the requests, in the order of vLLM's model runner."""
        output = step.output
        for name in {*output.finished_req_ids, *(output.preempted_req_ids or ())}:
            self.forget(name)
        for identifier in output.free_encoder_mm_hashes:
            self.encoder.pop(identifier, None)
        for new in step.new:
            chat = self.chats[new.req_id]
            assert new.prefill_token_ids == chat.tokens[: len(new.prefill_token_ids)]
            self.rows[new.req_id] = [list(blocks) for blocks in new.block_ids]
            self.computed[new.req_id] = new.num_computed_tokens
            self.prefill[new.req_id] = len(new.prefill_token_ids)
            self.inputs[new.req_id] = {i: f.data for i, f in enumerate(new.mm_features)}
            chat.use(layout_of(new, self.manager))
        cached = output.scheduled_cached_reqs
        assert not cached.resumed_req_ids
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            for row, more in zip(self.rows[name], blocks or (), strict=bool(blocks)):
                row.extend(more)
        for name, updates in getattr(output, "encoder_input_updates", {}).items():
            self.inputs[name].update(updates)
        assert not getattr(output, "kv_cache_block_copies", None)

    def encode(self, output):
        for name, numbers in output.scheduled_encoder_inputs.items():
            for i in numbers:
                _, number = self.chats[name].pictures[i]
                assert self.inputs[name][i] is not None, "a picture without its pixels"
                self.encoder[f"picture-{number}"] = number
                self.encoded[number] += 1

    def execute(self, step):
        """Encode, write all tokens, attend, compact: the order inside a forward pass."""
        self.enter(step)
        output = step.output
        if not output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self.encode(output)
        sampled, spans = {}, {}
        for name, count in output.num_scheduled_tokens.items():
            chat, start = self.chats[name], self.computed[name]
            end, drafts = start + count, len(output.scheduled_spec_decode_tokens.get(name, ()))
            accepted = self.rng.randint(0, drafts)
            known = end - drafts + accepted
            self.read_pictures(chat, start, end)
            values = chat.values[start:end].copy()
            values[known - start :] = JUNK
            for group in range(len(self.groups)):
                blocks, offsets = self.slots(chat, group, np.arange(start, end))
                self.memory[blocks, offsets] = values ^ group
                written = set(blocks.tolist())
                assert written.isdisjoint(step.sealed), f"{name} writes into the prefix cache"
                self.written |= written
            samples = end - drafts >= self.prefill[name]
            self.seen["drafts rejected behind the prompt"] += (
                samples and accepted < drafts and start == chat.n
            )
            first = end - drafts
            sampled[name] = chat.tokens[first : first + accepted + 1] if samples else []
            self.computed[name] = known
            spans[name] = chat, start, known, end
        for chat, start, known, end in spans.values():
            for group, is_pruned in enumerate(self.groups):
                self.attend(chat, group, is_pruned, start, known, end)
        for chat, start, _, end in spans.values():
            if chat.pruned and end == chat.n:
                assert end - start >= W, "the prune step holds the window queries"
                row = self.rows[chat.name][self.groups.index(True)]
                self.memory[row[chat.N : chat.N + chat.C]] = chat.compact_value
        self.drafted = [name for name in sampled if sampled[name]]
        names = list(sampled)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
        )

    def read_pictures(self, chat, start, end):
        for first, number in chat.pictures:
            if first < end and first + PICTURES[number] > start:
                assert self.encoder.get(f"picture-{number}") == number, "encoder cache miss"

    def attend(self, chat, group, is_pruned, start, known, end):
        first = 0
        if not is_pruned:
            first = max(0, start - SLIDING + 1)
        elif chat.pruned and start >= chat.n:
            row = self.rows[chat.name][group]
            compact = self.memory[row[chat.N : chat.N + chat.C]]
            assert len(compact) == chat.C > 0
            assert (compact == chat.compact_value).all(), "head pages of another request"
            first = chat.n - W
        elif chat.pruned:
            assert end == chat.n or end <= chat.n - W, "a chunk that cuts the window"
        past = np.arange(first, known)
        blocks, offsets = self.slots(chat, group, past)
        wrong = self.memory[blocks, offsets] != chat.values[past] ^ group
        assert not wrong.any(), (
            f"{chat.name} [{start}, {end}) of {chat.n} reads at {past[wrong][:5]} in blocks "
            f"{sorted(set(blocks[wrong].tolist()))} of group {group} what was never computed"
        )

    def take_draft_token_ids(self, drafts):
        names, self.drafted = self.drafted or [], None
        return DraftTokenIds(names, [[1] * self.rng.randint(0, drafts) for _ in names])


class Later(Future):
    """A result that the device computes when it is asked for, or earlier."""

    def __init__(self, device, step, take):
        super().__init__()
        self.device, self.step, self.take = device, step, take

    def result(self, timeout=None):
        self.device.run_until(self.step)
        return self.take(self.step)


class Device(Executor):
    """An executor that lets the simulation's worker execute steps in order, now or later."""

    supports_pp = True

    def __init__(self, simulation, vllm_config):
        self.simulation = simulation
        self.queue = deque()
        super().__init__(vllm_config)

    def _init_executor(self):
        self.specs = layer_specs(self.vllm_config, self.simulation.scenario.share)
        self.stages = self.vllm_config.parallel_config.pipeline_parallel_size

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None, non_block=False):
        assert not non_block
        while self.queue:  # what was sent before is done before
            self.run_until(self.queue[0])
        call = getattr(self, f"_{method}")
        return [call(stage, *args, **(kwargs or {})) for stage in range(self.stages)]

    def _get_kv_cache_spec(self, stage):
        first, end = get_pp_indices(len(self.specs), stage, self.stages)
        return dict(list(self.specs.items())[first:end])

    def _get_supported_kv_cache_layouts(self, stage):
        return ["LBNHC"]

    def _set_kv_cache_layout(self, stage, *args):
        pass

    def _determine_available_memory(self, stage):
        return 1 << 40

    def _initialize_from_config(self, stage, configs):
        (self.blocks,) = {config.num_blocks for config in configs}

    def _compile_or_warm_up_model(self, stage):
        return CompilationTimes(0.0, 0.0)

    def _take_draft_token_ids(self, stage):
        return self.simulation.worker.take_draft_token_ids(self.simulation.scenario.drafts)

    def _reset_encoder_cache(self, stage):
        self.simulation.worker.encoder.clear()

    def _reset_mm_cache(self, stage):
        pass

    def _synchronize_device(self, stage):
        pass

    def _sleep(self, stage, level):
        self.simulation.worker.memory[:] = JUNK

    def _wake_up(self, stage, tags):
        pass

    def _shutdown(self, stage):
        pass

    def check_health(self):
        pass

    def execute_model(self, scheduler_output, non_block=False):
        assert non_block
        step = self.simulation.dispatch(scheduler_output)
        self.queue.append(step)
        self.last = step
        if self.simulation.rng.random() < 0.4 and not step.fails:
            self.run_until(step)
        empty = not scheduler_output.total_num_scheduled_tokens
        return Later(self, step, lambda step: step.result if empty else None)

    def sample_tokens(self, grammar_output, non_block=False):
        assert grammar_output is None
        if self.last.fails and non_block and self.simulation.rng.random() < 0.5:
            nothing = Future()  # vLLM's word for: look at what became of the step itself
            nothing.set_result(None)
            return nothing
        later = Later(self, self.last, lambda step: step.result)
        return later if non_block else later.result()

    def run_until(self, step):
        """Execute all steps up to this one."""
        self.simulation.faults.interrupt("while a step runs")
        while step.result is None:
            first = self.queue.popleft()
            if first.fails:
                raise DeviceError("this device fails")
            first.result = self.simulation.worker.execute(first)
        self.simulation.faults.interrupt("when a result is there")
