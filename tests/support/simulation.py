"""vLLM's real engine core with many requests, and a device that checks what it reads. No model.

The device keeps one number for each token's KV and one for each picture, and executes steps in the
order in which it got them, when a seed says so or when the engine waits for one. Everything that a
run does follows from its seed: traffic, settings, faults, and where between the engine's calls they
happen.
"""

import copy
import pickle
import random
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache, partial
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from vllm.config import KVEventsConfig
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import received
from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.config import Serving, pruned_layers
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.scheduler.stats import Outcome
from sparsemm_vllm.engine.spec import SparseMMSpec
from support import tiny

W, BASE, P = 8, 16, 16
MAX_LEN, MAX_SEQS, STEP_TOKENS, DRAFTS = 400, 24, 120, 3
SLIDING = 32  # of Gemma's other layers
JUNK, STOP, PICTURE = -7, 99, 98
ASKED = [None] * 4 + [{"sparsemm": 0}, {"sparsemm_budget": W + 2}, {"sparsemm_budget": 48}]
ASKED += [{"sparsemm_budget": W}]  # which cannot be
# At and beside what ends a window, a budget or a block.
EDGES = [1, 2, 9, 10, 11, 15, 16, 17, 23, 24, 25, 31, 32, 33, 39, 40, 41, 47, 48, 49, 64, 72]
PICTURES = [3, 5, 7, 8, 12, 16, 20, 31, 40]  # tokens of each; a picture's number is its index
AHEAD = 4  # steps in flight at most
PATIENCE = 400  # calls of the engine without any progress
# Collection of garbage takes longer than all steps of so small an engine; vLLM's environment must
# stay as later tests of this process set it.
ALONE_IN_ITS_PROCESS = mock.patch.multiple(
    "vllm.v1.engine.core",
    freeze_gc_heap=mock.DEFAULT,
    cleanup_dist_env_and_memory=mock.DEFAULT,
    enable_envs_cache=mock.DEFAULT,
)


class DeviceError(RuntimeError):
    """The device failed, as a seed wanted it to."""


@dataclass(frozen=True)
class Scenario:
    """What an engine is started with.

    Attributes:
        groups: KV cache groups: 1 of full attention, or 2, one with a sliding window.
        asynchronous: whether vLLM schedules before it knows the last tokens.
        stages: stages of the pipeline: as many steps are in flight, one more if asynchronous.
        queue: steps in flight, if not so many.
        drafts: tokens that are drafted for each request at most.
        policy: order of scheduling, of vLLM's `SchedulerConfig`.
        spare: blocks beyond those that the largest request needs.
        share: `prune_when_free_below`.
        encoder: embeddings that the encoder cache holds, and that a step may compute.
        threshold: `long_prefill_token_threshold`.
        events: whether vLLM says what the prefix cache holds.
        scheduling: further fields of vLLM's `SchedulerConfig`.
        faulty: probability of a fault at each place where one may happen.
        fails_at: step in which the device fails, if any.
    """

    groups: int = 1
    asynchronous: bool = False
    stages: int = 1
    queue: int | None = None
    drafts: int = 0
    policy: str = "fcfs"
    spare: int = 20
    share: float | None = None
    encoder: tuple[int, int] = (80, 48)
    threshold: int = 0
    events: bool = False
    scheduling: dict[str, Any] = field(default_factory=dict)
    faulty: float = 0.02
    fails_at: int | None = None

    @classmethod
    def of_seed(cls, seed: int) -> "Scenario":
        rng = random.Random(seed)
        asynchronous = rng.random() < 0.6
        stages = rng.choice([1, 1, 2, 3])
        # Without asynchronous scheduling vLLM would draft from tokens that are still in flight.
        drafts = DRAFTS if (asynchronous or stages == 1) and rng.random() < 0.5 else 0
        groups = 2 if stages < 3 and rng.random() < 0.3 else 1
        deep = asynchronous and stages == groups == 1
        return cls(
            groups=groups,
            asynchronous=asynchronous,
            stages=stages,
            queue=rng.choice([None, 3, 4]) if deep else None,
            drafts=drafts,
            policy=rng.choice(["fcfs", "priority", "priority"]),
            spare=rng.choice([0, 0, 1, 3, 8, 25]),
            share=rng.choice([None, None, 0.2, 0.5]),
            encoder=rng.choice([(40, 40), (40, 48), (48, 48), (160, 80)]),
            threshold=rng.choice([0, 0, W, 30]),
            faulty=rng.choice([0.0, 0.01, 0.03]),
            fails_at=rng.randrange(20, 200) if rng.random() < 0.08 else None,
        )


@cache
def _model_folder(groups: int) -> TemporaryDirectory:
    """A model's configuration, until the process ends."""
    folder = TemporaryDirectory(prefix="simulation-")
    config = tiny.text_config() if groups == 1 else tiny.gemma3_config()
    config.architectures = ["LlamaForCausalLM" if groups == 1 else "Gemma3ForCausalLM"]
    config.save_pretrained(folder.name)
    return folder


@cache
def _base_config(groups: int, drafts: int) -> Any:
    load_general_plugins()
    patches.install()
    settings = {
        "budget": W + BASE,
        "window": W,
        "profile": tiny.skewed_profile().model_dump(mode="json"),
    }
    ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3}
    return EngineArgs(
        model=_model_folder(groups).name,
        skip_tokenizer_init=True,
        attention_backend="SPARSEMM",
        additional_config={"sparsemm": settings},
        dtype="float32",
        block_size=P,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=True,
        speculative_config=ngram if drafts else None,
    ).create_engine_config()


def make_config(scenario: Scenario) -> Any:
    """vLLM's configuration; what the CPU platform would switch off is set afterwards."""
    config = copy.deepcopy(_base_config(scenario.groups, scenario.drafts))
    config.scheduler_config.async_scheduling = scenario.asynchronous
    config.scheduler_config.policy = scenario.policy
    config.scheduler_config.long_prefill_token_threshold = scenario.threshold
    if scenario.events:
        config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    for name, value in scenario.scheduling.items():
        assert hasattr(config.scheduler_config, name)
        setattr(config.scheduler_config, name, value)
    config.parallel_config.pipeline_parallel_size = scenario.stages
    config.parallel_config.world_size = scenario.stages
    assert config.use_v2_model_runner
    assert config.max_concurrent_batches == scenario.stages + scenario.asynchronous
    return config


def layer_specs(config: Any, share: float | None) -> dict[str, Any]:
    """KV cache specs of all layers, by name."""
    shape = {
        "block_size": P,
        "num_kv_heads": tiny.KV_HEADS,
        "head_size": tiny.HEAD_SIZE,
        "dtype": torch.float32,
    }
    serving = Serving.of(config)
    pruned = SparseMMSpec(
        **shape, layout=serving.layout, prune_when_free_below=share, limits=serving.limits
    )
    sliding = SlidingWindowSpec(**shape, sliding_window=SLIDING)
    full = pruned_layers(config.model_config)
    return {
        f"model.layers.{layer}.self_attn.attn": pruned if layer in full else sliding
        for layer in range(tiny.LAYERS)
    }


def least_blocks(config: Any, specs: dict[str, Any]) -> int:
    """Blocks that the largest request needs, and the one that holds nothing."""
    groups = {type(spec): spec for spec in specs.values()}.values()
    return 1 + sum(s.max_memory_usage_bytes(config) // s.page_size_bytes for s in groups)


class Chat:
    """A request whose answer is known beforehand, and what the cache must hold for each token.

    The value of a token is a hash of all tokens and pictures up to it, as its keys and values
    depend on them; answers to a pruned prompt are private to the chat.
    """

    def __init__(
        self, index, prompt, answer_tokens, pictures=(), asked=None, stops=False, priority=0
    ):
        self.index, self.name, self.n = index, f"chat-{index}", len(prompt)
        self.answer_tokens, self.asked, self.priority = answer_tokens, asked, priority
        self.arrival = float(index)
        self.pictures = pictures  # (first token, number)
        further = answer_tokens + (AHEAD + 2) * (DRAFTS + 1)  # steps in flight may sample more
        self.tokens = [*prompt, *((31 * index + i) % 97 for i in range(further))]
        self.max_tokens = answer_tokens
        if stops:  # at a token that the scheduler does not foresee
            self.max_tokens = min(answer_tokens + 15, MAX_LEN - self.n)
            self.tokens[self.n + answer_tokens - 1] = STOP
        self.compact_value = -1000 - index
        self.layout = None
        self.answer, self.finished, self.aborted = [], None, False
        seen = list(self.tokens)
        for first, number in pictures:
            for i in range(PICTURES[number]):
                seen[first + i] = 1_000_000 + 1_000 * number + i
        values, value = [], 0
        for token in seen:
            value = hash((value, token))
            values.append(value)
        self.dense_values = np.array(values)
        self.request = None

    def use(self, layout):
        """Its layout, known from its admission on, stays what it is."""
        assert self.layout in (None, layout), "a resumed request is pruned in another way"
        self.layout, self.pruned = layout, layout.is_pruned(self.n)
        self.N, self.C = -(-self.n // P), layout.compact_blocks(self.n, P)
        self.values = self.dense_values
        if self.pruned:
            self.values = self.dense_values.copy()
            self.values[self.n :] = [
                hash((self.index, position)) for position in range(self.n, len(self.tokens))
            ]

    def engine_request(self):
        features = [
            MultiModalFeatureSpec(
                data={"picture": number},
                modality="image",
                identifier=f"picture-{number}",
                mm_position=PlaceholderRange(offset=first, length=PICTURES[number]),
            )
            for first, number in self.pictures
        ]
        params = SamplingParams(
            max_tokens=self.max_tokens, stop_token_ids=[STOP], extra_args=self.asked
        )
        return EngineCoreRequest(
            request_id=self.name,
            prompt_token_ids=self.tokens[: self.n],
            mm_features=features or None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=self.arrival,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            priority=self.priority,
        )


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
        self.simulation.interrupt("while a step runs")
        while step.result is None:
            first = self.queue.popleft()
            if first.fails:
                raise DeviceError("this device fails")
            first.result = self.simulation.worker.execute(first)
        self.simulation.interrupt("when a result is there")


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


REPLAY = "tests/engine/scheduler/test_simulation.py -k test_any_seed"


class Verified(dict):
    """Hashes of blocks whose content was looked at; forgotten when the device writes there."""

    def __init__(self, worker):
        super().__init__()
        self.worker = worker

    def get(self, block):
        if block in self.worker.written:
            self.worker.written.discard(block)
            self.pop(block, None)
        return super().get(block)


def any_chat(simulation):
    """A new chat, one that shares a prefix, or the next turn of an earlier one."""
    rng, chats = simulation.rng, simulation.chats
    index, kind = len(chats), rng.random()
    prompt, pictures = [rng.randrange(90) for _ in range(rng.choice(EDGES))], []
    if kind < 0.4:
        family = rng.randrange(3)
        shared = rng.choice([15, 16, 17, 64, 100, 200])
        prompt = [100 + family] * shared + prompt
    elif kind < 0.7 and chats:
        earlier = rng.choice(list(chats.values()))
        kept = min(earlier.n + earlier.answer_tokens, 300)
        pictures = [p for p in earlier.pictures if p[0] + PICTURES[p[1]] <= kept]
        prompt = earlier.tokens[:kept] + prompt
    elif kind < 0.73:
        prompt = [rng.randrange(90) for _ in range(MAX_LEN - rng.choice([1, 2, 9]))]
    while rng.random() < 0.35 and len(prompt) < 330:
        number = rng.randrange(len(PICTURES))
        pictures.append((len(prompt), number))
        prompt += [PICTURE] * PICTURES[number] + [rng.randrange(90)] * rng.choice([0, 1, 5])
    most = min(60, MAX_LEN - len(prompt))
    answer_tokens = 1 if rng.random() < 0.1 else rng.randint(1, most)
    asked, stops = rng.choice(ASKED), rng.random() < 0.4
    return Chat(index, prompt, answer_tokens, pictures, asked, stops, rng.randrange(3))
