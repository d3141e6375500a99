"""Single steps of vLLM's scheduler that went wrong before: who is preempted, who waits for ever."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request, RequestStatus

from sparsemm_vllm.engine.sampling_limits import too_long
from sparsemm_vllm.engine.scheduler.stats import Outcome
from support.simulation.engine import Simulation
from support.simulation.scenario import P, Scenario, W
from support.simulation.traffic import Chat

LONG = [5000 + i for i in range(160)]
SPARE = 20
PRIORITIES = {"policy": "priority", "threshold": 32}


class Steps(Simulation):
    """Chats that the test chooses, and steps of the same size, scheduled and processed apart."""

    def __init__(self, blocks=None, **settings):
        scenario = Scenario(spare=SPARE, faulty=0.0, **settings)
        withheld = 0 if blocks is None else Steps(**settings).blocks - blocks
        super().__init__(0, scenario, withheld=withheld)
        self.scheduler.log_stats = False  # the tests take them
        self.step_tokens = 64

    def put(self, prompt, answer_tokens=4, asked=None, priority=0, arrival=None):
        chat = Chat(len(self.chats), list(prompt), answer_tokens, asked=asked, priority=priority)
        chat.arrival = chat.arrival if arrival is None else arrival
        self.enter(chat)
        return chat.request

    def schedule(self):
        self.scheduler.max_num_scheduled_tokens = self.step_tokens
        self.device.execute_model(self.scheduler.schedule(), non_block=True)

    def update(self):
        step = self.steps[0]
        self.device.run_until(step)
        outputs = self.scheduler.update_from_output(step.output, step.result)
        self.deliver(outputs)
        self.invariants.check()
        return outputs

    def step(self):
        self.schedule()
        return self.update()

    def run_to_the_end(self, steps=100):
        for _ in range(steps):
            if not self.scheduler.has_requests():
                return self.finish()
            self.step()
        raise AssertionError("it goes on and on")


@pytest.fixture
def said(monkeypatch):
    said = []
    monkeypatch.setattr("sparsemm_vllm.engine.scheduler.watchdog.logger.error", said.append)
    return said


# Priorities


@pytest.mark.parametrize(("asked", "blocks"), [(None, 14), ({"sparsemm": 0}, 12)])
def test_a_victim_was_not_scheduled_in_the_same_step(asked, blocks):
    """Nobody gets a hit on blocks of a chunk that never ran. The sizes make one that would."""
    steps = Steps(blocks, **PRIORITIES)
    low = steps.put(LONG, asked=asked, priority=5)
    steps.step()
    steps.put(range(7, 22), asked=asked)
    while not low.num_preemptions:
        steps.step()
    steps.put([*LONG, 1, 2, 3], asked=asked)  # reads what `low` left behind
    steps.run_to_the_end()


@pytest.mark.parametrize("arrivals", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0)])
def test_the_last_in_order_is_the_victim(arrivals):
    """Also among samples of one prompt, which arrive at the same moment."""
    steps = Steps(**PRIORITIES)
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


def test_without_priorities_the_order_stays():
    steps = Steps()
    first, second = (steps.put(range(i, i + 20), arrival=5.0 - i) for i in range(2))
    steps.step()
    steps.step()
    assert steps.scheduler.running == [first, second]
    steps.run_to_the_end()


# Blocks that a pruned prompt gives back


@pytest.mark.parametrize("ahead", [0, 2])
def test_older_blocks_are_free_when_the_step_that_prunes_is_processed(ahead):
    """Not when the request needs another block: it may need none for long."""
    steps = Steps(asynchronous=ahead > 0)
    free = steps.pool.get_num_free_blocks()
    request = steps.put(LONG[:60], answer_tokens=2)
    for _ in range(1 + ahead):
        steps.schedule()
    prompt = steps.manager.prompts[request.request_id]
    held = -(-60 // P) + prompt.compact_blocks
    assert steps.pool.get_num_free_blocks() == free - held
    steps.update()
    assert prompt.freed_blocks == (60 - W) // P > 0
    assert steps.pool.get_num_free_blocks() == free - held + prompt.freed_blocks
    steps.invariants.check()
    while steps.steps:
        steps.update()
    steps.run_to_the_end()


# What can never be scheduled


def ended(outputs, request):
    (output,) = (o for client in outputs.values() for o in client.outputs)
    assert output.request_id == request.request_id
    return output


def test_a_prompt_that_the_pool_cannot_hold_is_ended_with_an_error(said):
    """A block less than prompt and compact blocks need; with it, it is served."""
    layout = Steps().manager.layout
    needed = len(LONG) // P + layout.compact_blocks(len(LONG), P)
    enough = Steps(needed + 1)
    enough.put(LONG, 1)
    enough.run_to_the_end()

    steps = Steps(needed)
    steps.manager.watchdog.patience = 5
    request = steps.put(LONG, 1)
    for _ in range(4):
        steps.step()
    assert request.status is RequestStatus.WAITING
    assert not said
    output = ended(steps.step(), request)
    assert output.finish_reason is FinishReason.ERROR
    assert len(said) == 1
    assert "request chat-0 is ended with an error: nothing was scheduled in 5 steps" in said[0]
    assert f"{needed - 1} of {steps.blocks - 1} KV blocks are free" in said[0]
    if hasattr(output, "error"):
        assert output.error.message == said[0], "the client is told"
    # The engine lives.
    steps.put(range(30), 3)
    while steps.scheduler.has_unfinished_requests():
        steps.step()
    assert len(steps.chats["chat-1"].answer) == 3
    assert not steps.manager.prompts


def test_a_running_request_that_no_step_has_room_for_is_ended():
    """Steps smaller than a window are refused at startup; here one becomes so later."""
    steps = Steps()
    steps.manager.watchdog.patience = 5
    steps.step_tokens = W - 1
    request, short = steps.put(LONG[:60], 1), steps.put(range(9), 30)
    while short.status is not RequestStatus.FINISHED_LENGTH_CAPPED:
        steps.step()
        assert request.status in (RequestStatus.WAITING, RequestStatus.RUNNING), "others go on"
    for _ in range(20):
        steps.step()
    assert request.status is RequestStatus.FINISHED_ERROR
    assert steps.pool.get_num_free_blocks() == steps.blocks - 1


def test_what_waits_for_a_step_in_flight_is_not_stuck(said):
    """The last token is known to come, and nothing else is to be scheduled until it has."""
    steps = Steps(asynchronous=True)
    steps.manager.watchdog.patience = 1
    request = steps.put(range(30), 1)
    for _ in range(6):
        steps.schedule()
    assert len(steps.steps) - sum(bool(step.reads) for step in steps.steps) == 5, "nothing to do"
    while steps.steps:
        steps.update()
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert not said


def test_only_idle_steps_one_after_another_count(said):
    steps = Steps()
    steps.manager.watchdog.patience = 3
    busy, stuck = steps.put(range(10), 20), steps.put(LONG[:60], 1)
    steps.step_tokens = W - 1
    while busy.status is not RequestStatus.FINISHED_LENGTH_CAPPED:
        steps.step()
    for _ in range(2):
        steps.step()
    assert not said
    steps.step()
    assert len(said) == 1
    assert stuck.request_id in said[0]


def test_who_waits_for_another_instances_encoder_is_not_stuck(said):
    """What it sends may take longer than any number of steps."""
    steps = Steps()
    steps.manager.watchdog.patience = 5
    steps.put(LONG[:60], 1)
    idle = SimpleNamespace(total_num_scheduled_tokens=0)
    steps.scheduler.ec_connector = object()
    for _ in range(20):
        steps.manager.watchdog.observe(steps.scheduler, idle)
    assert not said
    steps.scheduler.ec_connector = None
    for _ in range(5):
        steps.manager.watchdog.observe(steps.scheduler, idle)
    assert len(said) == 1


def test_a_paused_engine_ends_nothing():
    steps = Steps()
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
def test_what_cannot_be_is_served_as_the_server_would(extra_args, monkeypatch):
    said = []
    monkeypatch.setattr(
        "sparsemm_vllm.engine.scheduler.manager.logger.warning",
        lambda text, *a: said.append(text % a),
    )
    steps = Steps()
    for _ in range(3):
        steps.put(LONG, asked=extra_args)
    steps.run_to_the_end()
    assert steps.seen[Outcome.PRUNED] == 3
    assert steps.chats["chat-0"].layout is steps.manager.layout
    assert steps.manager.stats.drain(0)["invalid_requests"] == 3
    assert steps.manager.stats.drain(0)["invalid_requests"] == 0
    assert len(said) == 1, "the others are counted"
    assert "request 'chat-0' was not checked by its front end: " in said[0]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias: 1,025, at most 1,024"),
        ({"allowed_token_ids": list(range(1025))}, "allowed_token_ids: 1,025, at most 1,024"),
        (
            {"stop_token_ids": list(range(200)), "min_tokens": 1},
            "stop_token_ids (with min_tokens): 200, at most 128",
        ),
        ({"logprob_token_ids": list(range(129))}, "logprob_token_ids: 129, at most 128"),
        ({"bad_words": [[1]] * 129}, "bad_words: 129, at most 128"),
        ({"bad_words": [[1] * 2000]}, "bad_words, in tokens: 2,000, at most 1,024"),
    ],
)
def test_lists_that_no_worker_has_room_for_end_their_request(asked, reason):
    """A worker raises for them, which ends the engine; vLLM's front ends let most of them pass."""
    steps = Steps()
    request, other = steps.put(LONG, 3), steps.put(range(20), 3)
    words = asked.pop("bad_words", None)
    params = SamplingParams(max_tokens=3, **asked)
    params._bad_words_token_ids = words
    request.sampling_params = params
    output = ended(steps.step(), request)
    assert output.finish_reason is FinishReason.ERROR
    if hasattr(output, "error"):
        assert output.error.message == f"too many entries: {reason}"
    while other.status is not RequestStatus.FINISHED_LENGTH_CAPPED:
        steps.step()
    # What workers were sent is what they take.
    assert too_long(params) is not None
    assert too_long(request.sampling_params) is None


def test_streaming_input_ends_with_its_first_part():
    """Its prompt would grow after it was pruned."""
    steps = Steps()
    request = steps.put(LONG, 2)
    request.resumable, request.streaming_queue = True, None
    steps.run_to_the_end()
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED


def test_no_client_can_write_what_the_scheduler_decides():
    """A request's attribute, of which nothing travels in a client's message."""
    import msgspec
    from vllm.v1.engine import EngineCoreRequest

    from sparsemm_vllm.engine.scheduler.manager import ACCEPTED

    assert ACCEPTED not in {field.name for field in msgspec.structs.fields(EngineCoreRequest)}
    request = Request("a", [1], SamplingParams(), None)
    assert not hasattr(request, ACCEPTED)
