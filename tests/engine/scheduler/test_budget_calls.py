"""How often budgets are redistributed while requests are admitted, served and freed."""

import pickle
from collections import Counter

import pytest
import torch
from kernel_cases import DEVICE
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash

from sparsemm_vllm.budget import layout as layout_module
from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import RequestLimits, accept
from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from support.chats import BASE, SCORES, Chats, P, W

SERVER = CacheLayout.from_scores(
    SCORES, 2, W + BASE, W, rho=0.0, redistribute=True, largest_budget=40
)
OWN = 20
# Prompt length and settings of requests; the last three are of lengths and budgets seen before.
REQUESTS = [
    (25, None),
    (40, None),
    (25, {"sparsemm_budget": OWN}),
    (25, {"sparsemm": 0}),
    (W + BASE - 1, None),
    (25, None),
    (25, {"sparsemm_budget": OWN}),
    (40, {"sparsemm_budget": W + BASE}),
]
SEEN = {(25, W + BASE), (40, W + BASE), (25, OWN)}


@pytest.fixture(scope="module", autouse=True)
def installed():
    patches.install()
    init_none_hash(sha256)


@pytest.fixture
def calls(monkeypatch):
    """Redistributions by prompt length and budget."""
    counts = Counter()
    original = layout_module.redistribute

    def redistribute(capacities, prompt_tokens, window):
        budget = round(int(capacities.sum()) / capacities.numel()) + window
        counts[prompt_tokens, budget] += 1
        return original(capacities, prompt_tokens, window)

    monkeypatch.setattr(layout_module, "redistribute", redistribute)
    return counts


def test_the_scheduler_counts_a_prompt_length_and_budget_once(calls):
    """While it waits for room, is prefilled in chunks, answers, is preempted, resumed and freed."""
    blocks = 60
    chats = Chats(blocks, layout=pickle.loads(pickle.dumps(SERVER)))
    holder = chats.add(range(P * (blocks - 2)), {"sparsemm": 0})
    chats.prefill(holder)
    requests = [
        chats.add(range(1000 * i, 1000 * i + n), asks) for i, (n, asks) in enumerate(REQUESTS, 1)
    ]
    for _ in range(5):
        assert not any(chats.admit(request) for request in requests), "no block is free"
    chats.finish(holder)
    for request in requests:
        for ends in (chats.preempt, chats.finish):
            chats.prefill(request, tokens=11)
            for _ in range(2 * P):
                chats.run(request)
                chats.check()
            ends(request)
    assert calls == dict.fromkeys(SEEN, 1)
    chats.close()


def test_a_worker_counts_a_prompt_length_and_budget_once(calls):
    layout = pickle.loads(pickle.dumps(SERVER))
    own = layout.slice_of(0, 0)
    state = SparseState(
        layout, own, Heads(3, 4, 2, 16, torch.bfloat16), Capacity(4, 400, 3), DEVICE
    )
    state.attach(PrunedCache(torch.empty(3, 1, 2, P, 32, device=DEVICE), {}))
    for index, (n, asks) in enumerate(REQUESTS * 2):
        state.add(index % 4, n, layout=accept(asks, RequestLimits(W, 40)).layout(layout))
    assert calls == dict.fromkeys(SEEN, 1)
