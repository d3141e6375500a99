"""What a layout remembers: each answer once, within bounds, and nobody else's."""

import gc
import pickle
import weakref

import pytest
import torch

from sparsemm_vllm.budget import layout as layout_module
from sparsemm_vllm.budget.layout import CacheLayout
from support.layouts import BASE, PRUNING, W, make_layout


@pytest.fixture
def counted(monkeypatch):
    """Redistributions: budget and prompt length of each."""
    calls = []
    original = layout_module.redistribute

    def redistribute(capacities, prompt_tokens, window):
        calls.append((int(capacities.sum()), prompt_tokens))
        return original(capacities, prompt_tokens, window)

    monkeypatch.setattr(layout_module, "redistribute", redistribute)
    return calls


def ask_everything(layout, n):
    own = layout.slice_of(0, 0)
    return (
        layout.compact_blocks(n, 16),
        layout.freed_blocks(n, 16),
        layout.held_blocks(n, n + 50, 16),
        layout.most_kept(n, own),
        layout.mean_kept(n),
        layout.kept_tokens(n).tolist(),
    )


def test_a_prompt_length_is_counted_once(counted):
    """The scheduler asks for a waiting request in every step, workers ask more than one thing."""
    layout = make_layout(redistribute=True)
    for _ in range(50):
        ask_everything(layout, 100)
        ask_everything(layout, 101)
    assert [n for _, n in counted] == [100, 101]
    ask_everything(layout, W + BASE - 1)
    assert len(counted) == 2, "a prompt that stays whole"


def make_server(**options):
    """A layout from whose scores those of other budgets are made."""
    scores = torch.tensor([[8.0, 1.0, 1.0, 0.0], [2.0, 2.0, 30.0, 4.0]])
    return CacheLayout.from_scores(scores, 4, 20, W, 0.0, redistribute=True, **options)


@pytest.mark.parametrize("method", PRUNING)
def test_budgets_do_not_mix_in_memory(method):
    """The server's and those of requests remember in one place, by budget."""
    server = make_server(method=method)
    for _ in range(2):
        for budget in (12, 20, 40):
            own = server.of_budget(budget)
            assert own.window + own.base == budget
            fresh = pickle.loads(pickle.dumps(own))
            for n in (40, 41, 70):
                assert ask_everything(own, n) == ask_everything(fresh, n)
                assert own.most_compact_blocks(n, 16) == fresh.most_compact_blocks(n, 16)
    assert server.of_budget(40).of_budget(12) is server.of_budget(12)
    assert server.of_budget(40).of_budget(20) is server.of_budget(20) is server


def test_what_is_handed_out_is_the_callers_own():
    layout = make_layout(redistribute=True)
    before = ask_everything(layout, 100)
    layout.kept_tokens(100)[:] = 7
    assert ask_everything(layout, 100) == before


def test_memory_is_bounded_over_all_budgets(counted, monkeypatch):
    """In bytes: here of three arrays."""
    monkeypatch.setattr(layout_module, "KEPT_BYTES", 3 * 8 * 8)
    server = make_server()
    for budget, n in [(20, 50), (20, 60), (30, 50)] * 5:
        server.of_budget(budget).mean_kept(n)
    assert counted == [(128, 50), (128, 60), (208, 50)]
    server.of_budget(30).mean_kept(60)  # a fourth, so that the first is forgotten
    server.of_budget(20).mean_kept(60)
    assert len(counted) == 4
    server.of_budget(20).mean_kept(50)
    assert counted[3:] == [(208, 60), (128, 50)]


def test_a_large_model_remembers_many_lengths(counted):
    """80 layers of 64 heads: 40 kB a prompt length, so some 100 of them."""
    layout = CacheLayout(((100,) * 63 + (9000,),) * 80, window=32, base=224, redistribute=True)
    for _ in range(2):
        for n in range(1000, 1100):
            layout.mean_kept(n)
    assert len(counted) == 100


def test_a_budget_that_is_forgotten_is_gone():
    """At once, not when the garbage is collected: anyone may ask for many budgets."""
    server = make_server()
    gc.disable()
    try:
        first = weakref.ref(server.of_budget(100))
        ask_everything(first(), 300)
        assert first() is not None
        for budget in range(101, 101 + layout_module.BUDGETS):
            ask_everything(server.of_budget(budget), 300)
        assert first() is None
    finally:
        gc.enable()


def test_the_most_blocks_are_looked_for_once(counted, monkeypatch):
    """At lengths that take nobody's place: here of the one that is remembered."""
    monkeypatch.setattr(layout_module, "KEPT_BYTES", 8 * 8 * 8)
    layout = CacheLayout(((100,) * 7 + (9000,),) * 8, window=32, base=224, redistribute=True)
    layout.mean_kept(1000)
    most = layout.most_compact_blocks(32_768, 16)
    looked_at = len(counted)
    assert 60 < looked_at < 70
    assert layout.most_compact_blocks(32_768, 16) == most
    layout.mean_kept(1000)
    assert len(counted) == looked_at
