"""What a request may ask for: refused with a line that names the key, or a layout of its own."""

import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.budget.random_scores import random_scores
from sparsemm_vllm.budget.request import (
    RequestError,
    RequestLimits,
    accept,
    asks_for_us,
    check_request,
    received,
)
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.config import Serving
from support import tiny

W = 8
SERVER = RequestLimits.of(Settings(budget=40, window=W))
LAYOUT = CacheLayout.from_scores(
    tiny.skewed_profile().tensor(), tiny.KV_HEADS, 40, W, largest_budget=80
)


@pytest.mark.parametrize(
    "extra_args",
    [
        {"sparsemm": 0},
        {"sparsemm": 1},
        {"sparsemm": False},  # from Python; HTTP makes it 0
        {"sparsemm_budget": W + 1},
        {"sparsemm_budget": 80},
        {"sparsemm": 1, "sparsemm_budget": 40, "another_plugin": "x"},
    ],
)
def test_what_a_request_may_ask_for(extra_args):
    check_request(extra_args, SERVER)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"sparsemm": 2}, "sparsemm: Input should be less than or equal to 1"),
        ({"sparsemm": -1}, "sparsemm: Input should be greater than or equal to 0"),
        ({"sparsemm": "0"}, "sparsemm: Input should be a valid integer"),
        ({"sparsemm": 0.0}, "sparsemm: Input should be a valid integer"),
        ({"sparsemm": None}, "sparsemm: Input should be a valid integer"),
        ({"sparsemm_budget": "512"}, "sparsemm_budget: Input should be a valid integer"),
        ({"sparsemm_budget": 50.5}, "sparsemm_budget: Input should be a valid integer"),
        ({"sparsemm_budget": True}, "sparsemm_budget: Input should be a valid integer"),
        ({"sparsemm_budget": W}, "sparsemm_budget: 8 tokens; this server takes 9 to 80 "),
        ({"sparsemm_budget": 81}, "sparsemm_budget: 81 tokens; this server takes 9 to 80 "),
        ({"sparsemm_budget": 2**63}, "this server takes 9 to 80 "),
        ({"sparsemm": 0, "sparsemm_budget": 40}, "sparsemm_budget: 'sparsemm' is 0"),
        ({"sparsemm_buget": 40}, "'sparsemm_buget'; did you mean 'sparsemm_budget'?"),
        ({"SparseMM": 0}, "'SparseMM'; did you mean 'sparsemm'?"),
        ({"sparsemm_left_dense": 1}, "unknown request setting 'sparsemm_left_dense'"),
        ({"sparsemm\n\u202e": 1}, r"unknown request setting 'sparsemm\n\u202e'"),
        ({"sparsemm_record": [0, 1]}, "sparsemm_record: this server records no attention"),
        ({"sparsemm_knockout": [0, 0, 9]}, "sparsemm_knockout: this server records no"),
        ({"sparsemm_record": [0]}, "sparsemm_record: List should have at least 2 items"),
        ({"sparsemm_knockout": [0, 0, -9]}, "sparsemm_knockout.2: Input should be greater"),
        ({"sparsemm" + 5_000_000 * "x": 1}, "unknown request setting 'sparsemmxxx"),
        ({"sparsemm_budget": 10**9999}, "sparsemm_budget: a number of more than 64 bits"),
    ],
)
def test_what_is_refused_by_name(extra_args, message):
    with pytest.raises(RequestError) as error:
        check_request(extra_args, SERVER)
    assert message in str(error.value)
    assert str(error.value).isprintable(), "one line"
    assert len(str(error.value)) < 200


def test_a_budget_where_nothing_is_pruned_is_refused():
    with pytest.raises(RequestError, match="sparsemm_budget: this server prunes nothing"):
        check_request(
            {"sparsemm_budget": 40}, RequestLimits.of(Settings(budget=40, window=W, method="full"))
        )


def test_engines_that_record_attention_let_the_profiler_ask():
    recording = RequestLimits.of(Settings(budget=40, window=W, record_attention=4))
    check_request({"sparsemm_record": [0, 1], "sparsemm_knockout": [0, 0, 9]}, recording)


def test_the_largest_budget_of_a_server():
    assert Settings(budget=300).largest_budget == 600
    assert Settings(budget=300, max_request_budget=300).largest_budget == 300
    assert Settings(budget=2**31 - 1).largest_budget == 2**31 - 1
    with pytest.raises(ValueError, match=r"max_request_budget \(299 tokens\) must not be smaller"):
        Settings(budget=300, max_request_budget=299)


def test_only_our_keys_are_looked_at():
    assert not asks_for_us(None)
    assert not asks_for_us({"other": 1, "sparse": 2})
    assert asks_for_us({"other": 1, "SPARSEMM_x": 2})


def served(attention):
    """A configuration of vLLM's, as far as the front end looks at it."""
    config = SimpleNamespace(attention_config=attention, additional_config={})
    Serving(Settings(), LAYOUT, RequestLimits.of(Settings())).remember(config)
    return config


@pytest.mark.parametrize(("backend", "refused"), [("SPARSEMM", True), (None, False)])
def test_the_front_end_refuses_before_the_engine_sees_it(backend, refused):
    seen = []

    def process_inputs(self, request_id, prompt, params, resumable=False):
        seen.append(params)

    process = patches._request_check(process_inputs)
    attention = SimpleNamespace(
        backend=backend and SimpleNamespace(name=backend), backend_per_kind={}
    )
    config = served(attention)
    params = SamplingParams(extra_args={"sparsemm_budget": 1})
    arguments = SimpleNamespace(vllm_config=config), "id", "prompt", params
    if refused:
        with pytest.raises(VLLMValidationError, match="sparsemm_budget: 1 tokens"):
            process(*arguments)
    else:
        process(*arguments)
    assert bool(seen) != refused


def test_the_front_end_refuses_lists_that_no_worker_has_room_for():
    """Bad words are known as tokens only when vLLM has made the request."""

    def process_inputs(self, request_id, prompt, params, resumable=False):
        params._bad_words_token_ids = [[7] * 2000]
        return SimpleNamespace(sampling_params=params)

    attention = SimpleNamespace(backend=SimpleNamespace(name="SPARSEMM"), backend_per_kind={})
    processor = SimpleNamespace(vllm_config=served(attention))
    process = patches._request_check(process_inputs)
    with pytest.raises(VLLMValidationError, match="bad_words, in tokens: 2,000, at most 1,024"):
        process(processor, "id", "prompt", SamplingParams())


def test_a_server_may_take_no_request_settings():
    closed = RequestLimits.of(Settings(budget=40, window=W, allow_request_settings=False))
    for extra_args in ({"sparsemm": 0}, {"sparsemm_budget": 60}):
        with pytest.raises(RequestError, match=r"lets no request have its own \(allow_request_s"):
            check_request(extra_args, closed)
        assert accept(extra_args, closed).layout(LAYOUT) is LAYOUT
    assert check_request({"other": 1}, closed) == check_request({}, SERVER)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KEYS = st.sampled_from(
    ["sparsemm", "sparsemm_budget", "sparsemm_record", "sparsemm_knockout", "sparsemm_left_dense"]
)


@given(st.dictionaries(KEYS | st.text().map("sparsemm".__add__) | st.text(), ANYTHING))
def test_what_no_front_end_has_checked_never_fails(extra_args):
    """Scheduler and worker agree, and neither takes what the front end would have refused."""
    accepted = accept(extra_args, SERVER)
    sent = accepted.send(SamplingParams(extra_args=extra_args)).extra_args
    worker = received(sent, SERVER)
    assert worker.problem is None, "the scheduler sends what can be"
    assert worker.settings == accepted.settings
    assert not worker.left_dense
    asked = {key: value for key, value in extra_args.items() if asks_for_us([key])}
    if accepted.problem is None:
        assert check_request(asked, SERVER) == accepted.settings
    else:
        with pytest.raises(RequestError, match=re.escape(accepted.problem)):
            check_request(asked, SERVER)
        assert accepted.layout(LAYOUT) is LAYOUT
    assert {key: value for key, value in sent.items() if not asks_for_us([key])} == {
        key: value for key, value in extra_args.items() if not asks_for_us([key])
    }


def test_what_the_scheduler_decides_arrives_and_cannot_be_sent_by_a_client():
    forged = SamplingParams(extra_args={"sparsemm_left_dense": True, "other": 1})
    accepted = accept(forged.extra_args, SERVER)
    assert accepted.problem is not None
    assert accepted.send(forged).extra_args == {"other": 1}
    assert len(forged.extra_args) == 2, "samples may share their parameters"
    decided = replace(accepted, left_dense=True).send(forged)
    assert received(decided.extra_args, SERVER).layout(LAYOUT) is LAYOUT.dense


# Layouts


def layout_of(server, extra_args):
    """On a worker, of what the scheduler sends it."""
    sent = accept(extra_args, SERVER).send(SamplingParams(extra_args=extra_args))
    return received(sent.extra_args, SERVER).layout(server)


def test_a_request_without_settings_has_the_servers_layout():
    for extra_args in (None, {}, {"other": 3}, {"sparsemm": 1}, {"sparsemm_budget": 40}):
        assert layout_of(LAYOUT, extra_args) is LAYOUT


def test_a_dense_request_holds_its_prompt():
    dense = layout_of(LAYOUT, {"sparsemm": 0})
    assert not dense.is_pruned(10_000)
    assert dense.compact_blocks(10_000, 16) == dense.freed_blocks(10_000, 16) == 0
    assert LAYOUT.is_pruned(10_000)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].prunes])
def test_a_budget_of_its_own_is_that_of_a_server_with_this_budget(method):
    scores = tiny.skewed_profile().tensor()
    options = {"method": method, "largest_budget": 80, "redistribute": method == "snapkv"}
    server = CacheLayout.from_scores(scores, tiny.KV_HEADS, 40, W, **options)
    other = CacheLayout.from_scores(scores, tiny.KV_HEADS, 64, W, **options)
    own = layout_of(server, {"sparsemm_budget": 64})
    assert own == other
    assert own != server
    np.testing.assert_array_equal(own.kept_tokens(300), other.kept_tokens(300))
    # The worker's copy came through a pickle.
    worker = layout_of(pickle.loads(pickle.dumps(server)), {"sparsemm_budget": 64})
    assert worker == own


def test_a_budgets_layout_is_made_once():
    assert LAYOUT.of_budget(50) is LAYOUT.of_budget(50)
    assert LAYOUT.dense is LAYOUT.dense


@st.composite
def servers(draw):
    """Any method, budgets and spread over ranks; few heads have most of the score."""
    L, Hkv, G = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    name = draw(st.sampled_from([m for m in METHODS if METHODS[m].prunes]))
    cut = draw(st.integers(0, L - 1))
    ranks = [r for r in (1, 2, 4) if Hkv % r == 0 and (r == 1 or not METHODS[name].split)]
    scores = random_scores(draw(st.integers(0, 99)), 0, range(L), Hkv * G) ** 8 + 1e-9
    budget = W + draw(st.integers(1, 60))
    return CacheLayout.from_scores(
        scores,
        Hkv,
        budget,
        W,
        draw(st.sampled_from([0.0, 0.1, 1.0])),
        name,
        redistribute=draw(st.booleans()),
        stages=((0, cut), (cut, L)) if cut else (),
        tensor_parallel=draw(st.sampled_from(ranks)),
        largest_budget=budget + draw(st.integers(0, 60)),
    )


@hypothesis_settings(max_examples=60)
@given(servers(), st.integers(1, 200), st.sampled_from([1, 4, 16]), st.data())
def test_no_budget_needs_more_than_what_is_set_aside(layout, longest, block_size, data):
    """The block table's row and the memory for one request are made for this many."""
    most = layout.most_compact_blocks(longest, block_size)
    for budget in data.draw(st.sets(st.integers(W + 1, layout.largest_budget), max_size=8)):
        own = layout.of_budget(budget)
        assert max(own.compact_blocks(n, block_size) for n in range(1, longest + 1)) <= most


@given(servers(), st.data())
def test_a_larger_budget_gives_no_head_less(layout, data):
    """What the bound above counts on, of methods whose capacities do not depend on the prompt."""
    a, b = sorted(data.draw(st.integers(W + 1, layout.largest_budget)) for _ in range(2))
    if layout.rules.shorten is None:
        smaller, larger = (torch.tensor(layout.of_budget(x).capacities) for x in (a, b))
        assert (smaller <= larger).all()


def test_little_is_set_aside_for_larger_budgets():
    """Not a second copy of the longest prompt: even heads at twice the budget, 448 tokens more."""
    layout = CacheLayout.from_scores(torch.ones(32, 32), 32, 256, largest_budget=512)
    assert layout.most_compact_blocks(32_768, 16) == (512 - 32) // 16
    assert layout.most_compact_blocks(100, 16) == -(-(100 - 32) // 16)
    assert layout.most_compact_blocks(32, 16) == 0
