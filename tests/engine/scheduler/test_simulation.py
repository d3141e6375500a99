"""Thousands of requests through vLLM's real engine core, faults among them."""

import logging
import os
from collections import Counter

import pytest

from sparsemm_vllm.engine.scheduler.stats import Outcome
from support.saturation import saturate
from support.simulation.engine import Simulation
from support.simulation.scenario import MAX_LEN, P, Scenario, W, least_blocks, make_config
from support.simulation.traffic import Chat

SEEDS = range(40)
SEED = os.environ.get("SIMULATION_SEED")  # of a run to be repeated

# Without these the runs would prove little: how often each has to happen in them.
RARE = {
    "preempted in its prune step": 20,
    "preempted in flight": 100,
    "resumed from its own prompt": 100,
    "outputs from before a preemption delivered": 100,
    "outputs from before a preemption dropped": 20,
    "aborted before its first step": 100,
    "aborted between steps": 20,
    "aborted when another was added": 5,
    "aborted when a step is sent": 20,
    "aborted while a step runs": 20,
    "aborted when a result is there": 20,
    "aborted in flight": 50,
    "aborted in its prune step": 5,
    "finished in flight": 100,
    "hits cut before the window": 10,
    "hits on what another holds": 100,
    "hits on what is being computed": 20,
    "window did not fit": 3,
    "full pool, one request": 1,
    "encoder cache got room for a window": 1,
    "chunks that end in a picture": 100,
    "pictures computed again": 100,
    "reset of prefix cache in flight": 3,
    "reset of running requests in flight": 3,
    "reset of encoder cache in flight": 3,
    "reset of all in flight": 3,
    "reset refused while requests run": 3,
    "paused to keep in flight": 3,
    "paused to abort in flight": 3,
    "duplicates refused": 10,
    "drafts rejected behind the prompt": 10,
    "device failed, engine ended": 2,
    "one-token answers": 50,
    "prompts that end a block": 50,
    "stopped by a token": 100,
    "empty steps": 100,
    **dict.fromkeys(Outcome, 50),
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """vLLM would log each engine and whatever a failing step held."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def run_seeds(seeds, calls):
    """What happened in the runs of these seeds, and how often."""
    seen = Counter()
    for seed in seeds:
        simulation = Simulation(seed).run(calls)
        seen += simulation.seen
        seen["calls"] += simulation.calls
    return seen


def test_any_seed():
    """All answers are right, all blocks come back, whatever happens between vLLM's calls."""
    if SEED is not None:
        run_seeds([int(SEED)], 400)
        return
    seen = run_seeds(SEEDS, 400)
    print(seen)
    assert seen["calls"] >= 20_000
    assert not seen["preempted in its own step"], "what it promised was never computed"
    missed = {what: seen[what] for what, least in RARE.items() if seen[what] < least}
    assert not missed, f"too rare to prove anything: {missed}"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_million_steps():
    seed, calls = 1_000, 0
    while calls < 1_000_000:
        calls += Simulation(seed).run(400).calls
        seed += 1


def test_a_seed_says_all():
    """A run can be repeated."""
    first, again = (Simulation(4).run(200) for _ in range(2))
    assert first.seen == again.seen
    assert first.events == again.events
    assert first.calls == again.calls


@pytest.mark.parametrize("asynchronous", [False, True])
def test_prompts_stay_whole_while_the_pool_is_ample(asynchronous):
    """Decided once for each request, and known to the workers, also when it is resumed."""
    scenario = Scenario(asynchronous=asynchronous, share=0.2, faulty=0.01)
    seen = Simulation(6, scenario).run(1200).seen
    assert min(seen[outcome] for outcome in Outcome) > 10, seen
    assert seen["preempted"] > 10


class Watermarked(Simulation):
    """Sees that a request is admitted beside others only if enough blocks stay free."""

    def dispatch(self, output):
        running = self.scheduler.running
        admitted = {new.req_id for new in output.scheduled_new_reqs}
        if running and running[-1].request_id in admitted:
            self._check_admission(running[-1], alone=len(running) == 1)
        return super().dispatch(output)

    def _check_admission(self, request, alone):
        """Of the last one: with what it takes until its prompt is pruned, nothing else came."""
        prompt = self.manager.prompts[request.request_id]
        whole = -(-request.num_tokens // P) + prompt.compact_blocks
        to_come = whole - len(self.manager.req_to_blocks[request.request_id])
        spare = self.pool.get_num_free_blocks() - to_come
        self.seen["alone" if alone else "beside others"] += 1
        assert alone or spare >= self.kv.watermark_blocks


@pytest.mark.parametrize("watermark", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_blocks_kept_free_for_running_requests(asynchronous, watermark):
    """--watermark: compact blocks count when a request is admitted, and none waits for ever.

    A request that is alone is admitted whatever is free: a large share would admit none.
    """
    scenario = Scenario(asynchronous=asynchronous, scheduling={"watermark": watermark}, faulty=0.0)
    simulation = Watermarked(5, scenario)
    assert simulation.kv.watermark_blocks == int(watermark * simulation.blocks)
    seen = simulation.run(2000).seen
    assert seen[Outcome.PRUNED] > 30
    assert seen["beside others"] > (2 if watermark == 0.9 else 40), seen
    assert seen["alone"] > (30 if watermark == 0.9 else 0), seen


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_active_seqs": 5},
        {"prefill_schedule_interval": 3},
        {"long_prefill_token_threshold": W + 1, "long_prefill_token_threshold_adaptive": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_hold_prompts_back(options):
    """Fewer requests at once, prompts in some steps only, chunks that are hardly a window."""
    seen = Simulation(8, Scenario(scheduling=options, faulty=0.0)).run(600).seen
    assert seen[Outcome.PRUNED] > 30


def longest(answer_tokens, asked=None):
    def traffic(simulation):
        index = len(simulation.chats)
        prompt = [(7 * i + index) % 90 for i in range(MAX_LEN - answer_tokens)]
        return Chat(index, prompt, answer_tokens, asked=asked)

    return traffic


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_largest_request_fits_exactly(asynchronous, groups):
    """Alone, and when several want the pool; with a block less the engine does not start."""
    scenario = Scenario(asynchronous=asynchronous, groups=groups, spare=0, faulty=0.0)
    for answer_tokens in (1, 2, P, P + 1, 60):
        for asked in (None, {"sparsemm_budget": 48}, {"sparsemm": 0}):
            traffic = longest(answer_tokens, asked)
            simulation = Simulation(1, scenario, traffic).run(10_000, at_once=3)
            assert len(simulation.chats) == 3
    with pytest.raises(ValueError, match="To serve at least one request"):
        Simulation(1, Scenario(asynchronous=asynchronous, groups=groups, spare=-1))


def test_least_blocks():
    """Of vLLM's own check: both copies of the longest prompt, and the block that holds nothing."""
    scenario = Scenario()
    simulation = Simulation(1, scenario)
    layout = simulation.manager.layout
    most = layout.most_compact_blocks(MAX_LEN, P)
    assert most >= layout.compact_blocks(MAX_LEN, P)
    assert least_blocks(make_config(scenario), simulation.device.specs) == MAX_LEN // P + most + 1


def test_saturated():
    """Figures that can be compared between commits do not change by themselves."""
    first, again = saturate(60), saturate(60)
    assert first == again
    for figures in first.values():
        assert figures["finished"] == 60
        assert 1 < figures["mean_running"] <= figures["most_running"]
