"""Single steps of vLLM's scheduler that went wrong before: who is preempted, who waits for ever."""

import copy

import numpy as np
import pytest
import test_scheduler
from test_scheduler import BLOCKS, Chat, P, Server, W, make_scheduler
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request, RequestStatus

from sparsemm_vllm.request_stats import Outcome

installed = test_scheduler.installed
vllm_config = test_scheduler.vllm_config
LONG = [5000 + i for i in range(160)]


class Steps(Server):
    """Chats that the test chooses, and steps of the same size."""

    def __init__(self, config, scheduler_class=Scheduler, ahead=0):
        scheduler, layout = make_scheduler(config, scheduler_class, 0)
        super().__init__(scheduler, layout, ahead, 0, seed=0)
        self.step_tokens = 64

    def put(self, prompt, answer_tokens=4, asked=None, priority=0, arrival=None):
        chat = Chat(len(self.chats), prompt, answer_tokens, asked, stops=False)
        self.chats[chat.name], self.answers[chat.name] = chat, []
        request = chat.request()
        request.priority = priority
        request.arrival_time = request.arrival_time if arrival is None else arrival
        self.scheduler.add_request(request)
        return request

    def schedule(self):
        size = self.step_tokens
        self.rng.random, self.rng.randint = (lambda: 1.0), (lambda _, high: min(high, size))
        return super().schedule()

    def step(self):
        self.schedule()
        self.check()
        self.update()
        self.check()

    def run_to_the_end(self, steps=100):
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests():
                self.aborted.add(None)
                return self.finish()
            self.step()
        raise AssertionError("it goes on and on")


@pytest.fixture
def with_blocks(monkeypatch):
    return lambda blocks: monkeypatch.setattr(test_scheduler, "BLOCKS", blocks)


@pytest.fixture
def priorities(vllm_config):
    config = copy.copy(vllm_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.policy = "priority"
    config.scheduler_config.long_prefill_token_threshold = 32
    return config


# Priorities


@pytest.mark.parametrize(("asked", "blocks"), [(None, 14), ({"sparsemm": 0}, 12)])
def test_a_victim_was_not_scheduled_in_the_same_step(priorities, with_blocks, asked, blocks):
    """Nobody gets a hit on blocks of a chunk that never ran. The sizes make one that would."""
    with_blocks(blocks)
    steps = Steps(priorities)
    low = steps.put(LONG, asked=asked, priority=5)
    steps.step()
    steps.put(range(7, 22), asked=asked)
    while not low.num_preemptions:
        steps.step()
    steps.put([*LONG, 1, 2, 3], asked=asked)  # reads what `low` left behind
    steps.run_to_the_end()


@pytest.mark.parametrize("arrivals", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0)])
def test_the_last_in_order_is_the_victim(priorities, arrivals):
    """Also among samples of one prompt, which arrive at the same moment."""
    steps = Steps(priorities)
    requests = [steps.put(range(i, i + 20), 9, arrival=at) for i, at in enumerate(arrivals)]
    urgent = steps.put(range(90, 110), 9, priority=-1, arrival=9.0)
    steps.step()
    steps.step()
    running = steps.scheduler.running
    assert running == [urgent, *sorted(requests, key=lambda request: request.arrival_time)]
    assert max(running, key=lambda r: (r.priority, r.arrival_time)) is running[-1]
    assert len({request.arrival_time for request in requests}) == 3
    np.testing.assert_allclose([r.arrival_time for r in requests], arrivals)
    steps.run_to_the_end()


def test_without_priorities_the_order_stays(vllm_config):
    steps = Steps(vllm_config)
    first, second = (steps.put(range(i, i + 20), arrival=5.0 - i) for i in range(2))
    steps.step()
    steps.step()
    assert steps.scheduler.running == [first, second]
    steps.run_to_the_end()


# Blocks that a pruned prompt gives back


@pytest.mark.parametrize(("scheduler_class", "ahead"), [(Scheduler, 0), (AsyncScheduler, 2)])
def test_older_blocks_are_free_when_the_step_that_prunes_is_processed(
    vllm_config, scheduler_class, ahead
):
    """Not when the request needs another block: it may need none for long."""
    steps = Steps(vllm_config, scheduler_class, ahead)
    request = steps.put(LONG[:60], answer_tokens=2)
    for _ in range(1 + ahead):
        steps.schedule()
    prompt = steps.manager.prompts[request.request_id]
    held = -(-60 // P) + prompt.compact_blocks
    assert steps.pool.get_num_free_blocks() == BLOCKS - 1 - held
    steps.update()
    assert prompt.freed_blocks == (60 - W) // P > 0
    assert steps.pool.get_num_free_blocks() == BLOCKS - 1 - held + prompt.freed_blocks
    steps.check()
    while steps.steps:
        steps.update()
    steps.run_to_the_end()


# What can never be scheduled


def ended(outputs, request):
    (output,) = (o for client in outputs.values() for o in client.outputs)
    assert output.request_id == request.request_id
    return output


def test_a_prompt_that_the_pool_cannot_hold_is_ended_with_an_error(
    vllm_config, with_blocks, monkeypatch
):
    """A block less than prompt and compact blocks need; with it, it is served."""
    layout = Steps(vllm_config).manager.layout
    needed = len(LONG) // P + layout.compact_blocks(len(LONG), P)
    with_blocks(needed + 1)
    enough = Steps(vllm_config)
    enough.put(LONG, 1)
    enough.run_to_the_end()

    with_blocks(needed)
    steps = Steps(vllm_config)
    steps.manager.watchdog.patience = 5
    said = []
    monkeypatch.setattr("sparsemm_vllm.watchdog.logger.error", said.append)
    request = steps.put(LONG, 1)
    for _ in range(4):
        steps.step()
    assert request.status is RequestStatus.WAITING
    assert not said
    steps.schedule()
    output = ended(finish_step(steps), request)
    assert output.finish_reason is FinishReason.ERROR
    assert len(said) == 1
    assert "request chat-0 is ended with an error: nothing was scheduled in 5 steps" in said[0]
    assert f"{needed - 1} of {needed - 1} KV blocks are free" in said[0]
    if hasattr(output, "error"):
        assert output.error.message == said[0], "the client is told"
    # The engine lives.
    steps.put(range(30), 3)
    while steps.scheduler.has_unfinished_requests():
        steps.step()
    assert len(steps.answers["chat-1"]) == 3
    assert not steps.manager.prompts


def finish_step(steps):
    step = steps.steps.popleft()
    sampled = steps.worker.execute(step, steps.chats)
    return steps.scheduler.update_from_output(step.output, steps.result(step, sampled))


def test_a_running_request_that_no_step_has_room_for_is_ended(vllm_config):
    """Steps smaller than a window are refused at startup; here one becomes so later."""
    steps = Steps(vllm_config)
    steps.manager.watchdog.patience = 5
    steps.step_tokens = W - 1
    request, short = steps.put(LONG[:60], 1), steps.put(range(9), 30)
    while short.status is not RequestStatus.FINISHED_LENGTH_CAPPED:
        steps.step()
        assert request.status in (RequestStatus.WAITING, RequestStatus.RUNNING), "others go on"
    for _ in range(20):
        steps.schedule()
        finish_step(steps)
    assert request.status is RequestStatus.FINISHED_ERROR
    assert steps.pool.get_num_free_blocks() == BLOCKS - 1


def test_what_waits_for_a_step_in_flight_is_not_stuck(vllm_config):
    """The last token is known to come, and nothing else is to be scheduled until it has."""
    steps = Steps(vllm_config, AsyncScheduler, ahead=2)
    steps.manager.watchdog.patience = 1
    request = steps.put(range(30), 1)
    for _ in range(6):
        steps.schedule()
    assert len(steps.steps) - sum(bool(step.reads) for step in steps.steps) == 5, "nothing to do"
    while steps.steps:
        steps.update()
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED


def test_a_paused_engine_ends_nothing(vllm_config):
    steps = Steps(vllm_config)
    steps.manager.watchdog.patience = 5
    request = steps.put(LONG, 1)
    steps.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(20):
        steps.step()
    assert request.status is RequestStatus.WAITING
    steps.scheduler.set_pause_state(PauseState.UNPAUSED)
    steps.run_to_the_end()


# Requests that no front end has checked


@pytest.mark.parametrize(
    "extra_args",
    [
        {"sparsemm_budget": "x"},
        {"sparsemm_budget": 10**6},
        {"sparsemm_left_dense": 1},
        {"sparsemm": [[0]]},
        {"sparsemm_record": [0, 1]},
        {"sparsemm_unknown": None, "sparsemm": 0},
    ],
)
def test_what_cannot_be_is_served_as_the_server_would(vllm_config, extra_args, monkeypatch):
    said = []
    monkeypatch.setattr(
        "sparsemm_vllm.kv_cache.logger.warning", lambda text, *a: said.append(text % a)
    )
    steps = Steps(vllm_config)
    for _ in range(3):
        steps.put(LONG, asked=extra_args)
    steps.run_to_the_end()
    assert steps.seen[Outcome.PRUNED] == 3
    assert steps.chats["chat-0"].layout is steps.manager.layout
    assert steps.manager.stats.drain(0)["invalid_requests"] == 3
    assert steps.manager.stats.drain(0)["invalid_requests"] == 0
    assert len(said) == 1, "the others are counted"
    assert "request 'chat-0' was not checked by its front end: " in said[0]


def test_streaming_input_ends_with_its_first_part(vllm_config):
    """Its prompt would grow after it was pruned."""
    steps = Steps(vllm_config)
    request = steps.put(LONG, 2)
    request.resumable, request.streaming_queue = True, None
    steps.run_to_the_end()
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED


def test_no_client_can_write_what_the_scheduler_decides():
    """A request's attribute, of which nothing travels in a client's message."""
    import msgspec
    from vllm.v1.engine import EngineCoreRequest

    from sparsemm_vllm.kv_cache import ACCEPTED

    assert ACCEPTED not in {field.name for field in msgspec.structs.fields(EngineCoreRequest)}
    request = Request("a", [1], SamplingParams(), None)
    assert not hasattr(request, ACCEPTED)
