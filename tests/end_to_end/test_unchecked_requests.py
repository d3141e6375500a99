"""Requests that come to the engine unchecked, as vLLM's Rust front end sends them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from support.engines import BLOCK, WINDOW, Engine, settings
from support.hostile import asked

pytestmark = pytest.mark.engine

BUDGET = 40
PROMPTS = [[5 + (i * step) % 90 for i in range(n)] for n, step in ((120, 1), (60, 7), (10, 3))]
NAMES = ["x" * 300, "x" * 10_000, "../../a/b", "/", "\0", "a\nb", "é\u202e", " ", "%2F"]
STEPS = 40  # of the engine until all requests of a test have ended


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    kept = tmp_path_factory.mktemp("kept")
    return Engine(model, settings(BUDGET, kept), num_gpu_blocks_override=64, max_model_len=256)


@pytest.fixture(scope="module")
def answers(engine: Engine) -> list[list[int]]:
    """The server's own answers to the prompts."""
    return serve(engine, [request(f"own-{i}", prompt) for i, prompt in enumerate(PROMPTS)])


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.rest()


def request(
    name: str, prompt: list[int], extra_args: dict[str, Any] | None = None, **changes: Any
) -> EngineCoreRequest:
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    params.extra_args = extra_args
    values = {
        "request_id": name,
        "prompt_token_ids": prompt,
        "mm_features": None,
        "sampling_params": params,
        "pooling_params": None,
        "arrival_time": time.time(),
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(values | changes))


def serve(
    engine: Engine, requests: list[EngineCoreRequest], watch: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Hand requests to the engine's core, past the front end, and step until all have ended."""
    client = engine.llm.llm_engine.engine_core
    answers: dict[str, list[int]] = {one.request_id: [] for one in requests}
    for one in requests:
        client.add_request(one)
    for _ in range(STEPS):
        for output in client.get_output().outputs:
            answers[output.request_id] += output.new_token_ids
        watch()
        if not engine.scheduler.has_unfinished_requests():
            break
    assert not engine.scheduler.has_unfinished_requests(), "not served in time"
    return list(answers.values())


def sendable(value: Any) -> Any:
    """The value as it arrives in another process, or nothing if it cannot be sent."""
    try:
        return MsgpackDecoder().decode(MsgpackEncoder().encode(value))
    except (OverflowError, UnicodeEncodeError):
        return None


def is_ours(extra_args: dict[str, Any]) -> bool:
    return any(key.lower().startswith("sparsemm") for key in extra_args)


@hypothesis_settings(
    max_examples=40, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)
@given(st.lists(asked, min_size=len(PROMPTS), max_size=len(PROMPTS)))
def test_settings_of_any_type(
    engine: Engine, answers: list[list[int]], extra_args: list[dict[str, Any]]
) -> None:
    """Every request is answered; one that asks nothing of us, as always."""
    extra_args = [sendable(one) or {} for one in extra_args]
    requests = [
        request(f"any-{i}", prompt, one)
        for i, (prompt, one) in enumerate(zip(PROMPTS, extra_args, strict=True))
    ]
    served = serve(engine, requests)
    for asked_of_us, tokens, own in zip(map(is_ours, extra_args), served, answers, strict=True):
        assert tokens == own if not asked_of_us else len(tokens) == 6
    engine.forget()


WRONG: list[dict[str, Any]] = [
    *({"sparsemm": value} for value in (None, -1, 2, 0.0, "0", "", [], [1], {}, {"a": 1}, 2**62)),
    *({"sparsemm_budget": budget} for budget in (
        None, WINDOW, 2 * BUDGET + 1, -1, 2**62, 40.5, "60", [], [60], {}, {"a": 1}, "v" * 10**6,
    )),
    *({key: [0, 0, 9]} for key in ("sparsemm_record", "sparsemm_knockout")),
    *({key: 1} for key in (
        "sparsemm_left_dense", "sparsemm_bugdet", "SPARSEMM_BUDGET", "sparsemm\n",
        "sparsemm" * 10**5,
    )),
    {"sparsemm": 0, "sparsemm_budget": 60},
    {f"sparsemm_{i}": i for i in range(10_000)},
]  # fmt: skip


@pytest.mark.parametrize("asked_of_us", WRONG, ids=lambda asked: str(asked)[:40])
def test_wrong_settings_are_the_servers_own(
    engine: Engine, answers: list[list[int]], asked_of_us: dict[str, Any]
) -> None:
    assert serve(engine, [request("wrong", PROMPTS[0], asked_of_us)]) == answers[:1]


def test_right_settings_are_heard(engine: Engine, answers: list[list[int]]) -> None:
    """Or the tests above would prove nothing."""
    n, dense = len(PROMPTS[0]), engine.layout.dense
    for extra_args, layout in (
        ({"sparsemm_budget": 80}, engine.layout.of_budget(80)),
        ({"sparsemm": 0}, dense),
    ):
        held: set[int] = set()

        def watch(held: set[int] = held) -> None:
            held.update(engine.held(name) for name in engine.scheduler.requests)

        serve(engine, [request("right", PROMPTS[0], extra_args)], watch)
        assert layout.held_blocks(n, n + 1, BLOCK) in held
        assert layout is dense or dense.held_blocks(n, n + 1, BLOCK) not in held


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:12])
def test_names_that_are_no_file_names(engine: Engine, answers: list[list[int]], name: str) -> None:
    """The engine records what was kept in files named for requests."""
    assert serve(engine, [request(name, PROMPTS[0])]) == answers[:1]


@pytest.mark.parametrize(
    "changes",
    [
        {"priority": 2**62},
        {"priority": -(2**62)},
        {"cache_salt": "x" * 100_000},
        {"trace_headers": {"a": "b"}},
        {"arrival_time": float("nan")},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_other_fields_at_their_ends(
    engine: Engine, answers: list[list[int]], changes: dict[str, Any]
) -> None:
    assert serve(engine, [request("field", PROMPTS[0], **changes)]) == answers[:1]
