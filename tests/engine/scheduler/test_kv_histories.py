"""What vLLM's scheduler does around `KVCacheManager`, in any order that hypothesis can think of.

With output of earlier steps outstanding, as with async scheduling.
"""

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash

from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.scheduler.stats import Outcome
from support.chats import ASKED, LENGTHS, SCORED, Chats, P, W


@pytest.fixture(scope="module", autouse=True)
def installed():
    patches.install()
    init_none_hash(sha256)


class Engine(RuleBasedStateMachine):
    caching = True
    seen: ClassVar[Counter] = Counter()

    def __init__(self):
        super().__init__()
        # Room for two or three of the longest requests: most histories run out of blocks.
        self.chats = Chats(blocks=48, layout=SCORED, caching=self.caching)

    def one_of(self, data, requests):
        return data.draw(st.sampled_from(requests))

    @initialize(share=st.sampled_from([None, 0.3, 0.7]))
    def choose_policy(self, share):
        self.chats.sparse.prune_when_free_below = share

    @precondition(lambda self: len(self.chats.waiting) < 5)
    @rule(
        family=st.integers(0, 1),
        shared=st.integers(0, 30),
        n=st.sampled_from(LENGTHS),
        asked=st.sampled_from(ASKED),
    )
    def add(self, family, shared, n, asked):
        prefix = [100 * family + i for i in range(min(shared, n))]
        tail = [5000 + 100 * self.chats.count + i for i in range(n - len(prefix))]
        self.chats.add(prefix + tail, asked)

    @precondition(lambda self: self.chats.running and len(self.chats.waiting) < 5)
    @rule(data=st.data(), extra=st.integers(1, 9), asked=st.sampled_from(ASKED))
    def add_next_turn(self, data, extra, asked):
        earlier = self.one_of(data, self.chats.running)
        self.chats.add([*earlier.all_token_ids, *range(9000, 9000 + extra)][:60], asked)

    @precondition(lambda self: self.chats.waiting)
    @rule(data=st.data(), tokens=st.integers(1, 60), lookahead=st.integers(0, 5))
    def admit(self, data, tokens, lookahead):
        request = self.one_of(data, self.chats.waiting)
        resumed = request.request_id in self.chats.layouts
        if self.chats.admit(request, tokens, lookahead):
            self.seen["resumed" if resumed else "admitted"] += 1
            self.seen["hits"] += request.num_computed_tokens > request.num_in_flight_tokens
            self.seen[self.chats.sparse.prompts[request.request_id].outcome] += 1

    @precondition(lambda self: self.chats.running)
    @rule(
        data=st.data(),
        tokens=st.integers(1, 60),
        lookahead=st.integers(0, 5),
        drafts=st.integers(0, 4),
    )
    def step(self, data, tokens, lookahead, drafts):
        self.chats.step(self.one_of(data, self.chats.running), tokens, lookahead, drafts)

    @precondition(lambda self: self.chats.running)
    @rule(data=st.data(), accepted=st.integers(0, 4))
    def process(self, data, accepted):
        request = self.one_of(data, self.chats.running)
        if outstanding := self.chats.outstanding.get(request.request_id):
            self.seen["rejected"] += outstanding[0][1] > accepted
            self.chats.process(request, accepted=accepted)

    @precondition(lambda self: self.chats.running)
    @rule(
        data=st.data(),
        steps=st.integers(1, 3 * P),
        tokens=st.integers(W, 60),
        drafts=st.integers(0, 3),
        accepted=st.integers(0, 3),
    )
    def run(self, data, steps, tokens, drafts, accepted):
        request = self.one_of(data, self.chats.running)
        self.chats.process(request, len(self.chats.outstanding[request.request_id]))
        for _ in range(steps):
            if self.chats.step(request, tokens, drafts=drafts):
                self.seen["rejected"] += self.chats.outstanding[request.request_id][0][1] > accepted
                self.chats.process(request, accepted=accepted)
                self.chats.check()

    @precondition(lambda self: self.chats.running)
    @rule(data=st.data())
    def preempt(self, data):
        request = self.one_of(data, self.chats.running)
        self.seen["preempted in flight"] += request.num_in_flight_tokens > 0
        self.chats.preempt(request)

    @precondition(lambda self: self.chats.running)
    @rule(data=st.data())
    def finish(self, data):
        self.chats.finish(self.one_of(data, self.chats.running))

    @precondition(lambda self: self.chats.waiting)
    @rule(data=st.data())
    def abort_while_waiting(self, data):
        self.chats.finish(self.one_of(data, self.chats.waiting))

    @invariant()
    def holds(self):
        self.seen["steps"] += 1
        self.seen["pruned and freed"] += bool(self.chats.pruned)
        self.chats.check()

    def teardown(self):
        self.chats.close()


class EngineWithoutCaching(Engine):
    caching = False


def run_histories(machine, examples, steps):
    """Steps of all kinds, as many as asked for; not all examples run to their end."""
    Engine.seen.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Engine.seen


# Without these the histories would prove little.
KINDS = ["admitted", "resumed", "rejected", "preempted in flight", "pruned and freed", *Outcome]


@pytest.mark.parametrize("machine", [Engine, EngineWithoutCaching])
def test_any_history(machine):
    seen = run_histories(machine, examples=220, steps=60)
    assert seen["steps"] >= 10_000
    assert min(seen[kind] for kind in KINDS) > 20, seen
    assert (seen["hits"] > 20) == machine.caching


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("machine", [Engine, EngineWithoutCaching])
def test_a_million_steps_of_any_history(machine):
    assert run_histories(machine, examples=9_000, steps=60)["steps"] >= 500_000
