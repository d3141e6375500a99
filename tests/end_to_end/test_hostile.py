"""Clients that send what nobody should: the server goes on, and others get their answers."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sparsemm_vllm.commands.server import Server
from support.engines import serve_options, settings
from support.hostile import (
    CHAT,
    COMPLETIONS,
    HUGE,
    RUDE,
    TOO_LONG,
    URLS,
    VOCABULARY,
    Call,
    Reply,
    Witness,
    calls,
    chat,
    completion,
    picture_urls,
    probe,
    send,
    tokens,
    wait_until_idle,
)

pytestmark = pytest.mark.engine

BUDGET, WINDOW = 40, 8
AT_ONCE = 8
PATIENCE = 45.0  # seconds; an answer of the fixed question takes 0.2 s on an idle machine
LARGEST_ERROR = 2000  # characters of an error of ours


@dataclass(frozen=True)
class Fault:
    """An answer 5xx that vLLM gives without SPARSEMM too.

    Attributes:
        about: expression found in the path and what was asked.
        says: expression that the answer has.
        why: what goes wrong in vLLM.
    """

    about: str
    says: str
    why: str


# A request that is refused when its pictures have been processed leaves them in the front end's
# cache, and not in the engine's. vLLM ends the next that shows one with an error, and forgets it:
# asked again, it answers.
DRIFT = "P0/P1 cache drift"
FAULTS = {
    "python": (
        Fault(r"\\ud800", "", "a lone surrogate cannot be encoded"),
        Fault('"structured_outputs"', "object has no attribute", "the type is not checked"),
        Fault(r'"\$ref"', "Internal server error", "the grammar's compiler raises"),
        Fault("image/png", "decompression bomb", "Pillow's refusal is no ValueError"),
        Fault("file:///", "Cannot load local files", "a RuntimeError"),
        Fault("127.0.0.1:9", "Cannot connect to host", "a ClientConnectorError"),
    ),
    "rust": (
        Fault("image_url", "multimodal preprocessing error", "a picture that cannot be read"),
        Fault(r'"\$ref"', "Internal server error", "the grammar's compiler raises"),
        Fault('"tools"', "tool parsing is disabled", "an option that was not given"),
        Fault(r'"allowed_token_ids": \[5(, 5){1000}|"bad_words": \["x{1500}', "", "of the engine"),
        Fault("^/v1/messages", "is not supported by the Rust frontend yet", "501"),
    ),
}


@pytest.fixture(scope="module", params=["python", "rust"])
def front_end(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(
    model: Path, front_end: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(front_end)
    options = serve_options(
        settings(BUDGET, folder / "kept"),
        max_num_seqs=str(AT_ONCE),
        limit_mm_per_prompt=json.dumps({"image": 4}),
    )
    variables = {"VLLM_USE_RUST_FRONTEND": str(int(front_end == "rust"))}
    with Server(str(model), options, folder / "log", variables) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def answer(server: Server) -> str:
    """The answer to the fixed question, before anything else was asked."""
    reply = probe(server)
    assert reply.status == 200, reply
    return reply.text


@pytest.fixture(autouse=True)
def _unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the server is alive, holds nothing and answers as before."""
    yield
    if "server" in request.fixturenames:
        assert_unharmed(request.getfixturevalue("server"), request.getfixturevalue("answer"))


def assert_unharmed(server: Server, answer: str) -> None:
    server.check_alive()
    assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
    assert probe(server).text == answer
    wait_until_idle(server)


def send_all(server: Server, asked: list[Call]) -> list[Reply]:
    """Send them at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda call: send(server, call, timeout=PATIENCE), asked))


def judge(front_end: str, call: Call, reply: Reply) -> None:
    """An answer is well formed: a result, or an error that says what is wrong."""
    told = f"{call!r}\n-> {reply.status} {reply.text[:500]}"
    if reply.status >= 500:
        asked = f"{call.path} {call.content().decode(errors='replace')}"
        faults = FAULTS[front_end]
        assert any(re.search(f.about, asked) and re.search(f.says, reply.text) for f in faults), (
            f"{told}\nnot known of vLLM"
        )
        return
    assert 200 <= reply.status < 300 or 400 <= reply.status < 500, told
    if reply.text.startswith("data:") or reply.text.startswith("event:"):
        data = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
        assert data, told
        for part in data:
            assert part == "[DONE]" or isinstance(json.loads(part), dict), told
    elif reply.text and (reply.status < 300 or "{" in reply.text):
        assert isinstance(json.loads(reply.text), dict), told
    if reply.status >= 400:
        assert reply.text or reply.status == 404, told
        if "request setting" in reply.text:
            assert reply.status == 400, told
            assert len(reply.text) < LARGEST_ERROR, told


def attack(server: Server, front_end: str, answer: str, asked: list[Call]) -> list[Reply]:
    """Send requests at once while somebody else asks the fixed question; judge all answers."""
    before = server.log.read_text(errors="replace").count(DRIFT)
    with Witness(server) as witness:
        replies = send_all(server, asked)
    assert witness.answers == {answer}
    assert max(witness.seconds) < PATIENCE
    drifts = server.log.read_text(errors="replace").count(DRIFT) - before
    for index, (call, reply) in enumerate(zip(asked, replies, strict=True)):
        if drifts and reply.status == 500 and b"image_url" in call.content():
            replies[index] = send(server, call, timeout=PATIENCE)
        judge(front_end, call, replies[index])
    return replies


# Any field of any type


def fuzzed(examples: int) -> Any:
    # No example is tried again: after one that ends the server all would fail.
    return hypothesis_settings(
        max_examples=examples,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@fuzzed(40)
@given(st.lists(calls(), min_size=AT_ONCE, max_size=AT_ONCE))
def test_requests_of_any_kind(
    server: Server, front_end: str, answer: str, asked: list[Call]
) -> None:
    attack(server, front_end, answer, asked)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@fuzzed(1000)
@given(st.lists(calls(), min_size=AT_ONCE, max_size=AT_ONCE))
def test_requests_of_any_kind_for_long(
    server: Server, front_end: str, answer: str, asked: list[Call]
) -> None:
    attack(server, front_end, answer, asked)
    wait_until_idle(server)


# Settings of ours


WRONG: list[tuple[str, Any]] = [
    *((key, value) for key in ("sparsemm", "sparsemm_budget") for value in (
        None, -1, 2, HUGE, -HUGE, 0.5, float("nan"), float("inf"), "", "many", "x" * 9000, [], [1],
        [[1]], {}, {"a": {"b": [1]}},
    )),
    *(("sparsemm_budget", budget) for budget in (WINDOW, 2 * BUDGET + 1, True, "40", 40.5)),
    *((key, [0, 0, 9]) for key in ("sparsemm_record", "sparsemm_knockout")),
    *((key, 1) for key in (
        "sparsemm_left_dense", "sparsemm_bugdet", "SPARSEMM", "Sparsemm_Budget", "sparsemm\0",
        "sparsemm\u202e\n", "sparsemm\ud800", "sparsemm" + "k" * (5 << 20),
    )),
]  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_wrong_setting(server: Server, front_end: str, path: str) -> None:
    """The Python front end says what is wrong; behind Rust the server's own settings are used."""
    good = completion(max_tokens=8) if path == COMPLETIONS else chat(URLS["good"], max_tokens=8)
    asked = [Call(path, good | {"vllm_xargs": {key: value}}) for key, value in WRONG]
    own = json.loads(send(server, Call(path, good)).text)["choices"]
    for (key, _), call, reply in zip(WRONG, asked, send_all(server, asked), strict=True):
        judge(front_end, call, reply)
        if front_end == "python" and "\ud800" not in key:
            assert reply.status == 400, call
            assert re.search(f"{key[:15]}|vllm_xargs|extra_args", reply.text, re.I), reply.text
        elif reply.status == 200:
            assert json.loads(reply.text)["choices"] == own, call


@pytest.mark.parametrize(
    "asked",
    [
        {f"sparsemm_{i}": i for i in range(10_000)},
        {f"key-{i}": i for i in range(10_000)},
        {"k" * (5 << 20): 1},
        {"sparsemm_budget": "v" * (5 << 20)},
        {"sparsemm_record": [0] * 100_000},
        {"sparsemm_knockout": [HUGE] * 1000},
        [],
        "x",
        HUGE,
    ],
    ids=["settings", "keys", "key", "value", "list", "huge", "no dict", "text", "number"],
)  # fmt: skip
def test_large_or_shapeless_settings(
    server: Server, front_end: str, answer: str, asked: Any
) -> None:
    attack(server, front_end, answer, [Call(COMPLETIONS, completion(vllm_xargs=asked))])


def test_lists_that_no_worker_has_room_for(server: Server, front_end: str, answer: str) -> None:
    asked = [Call(COMPLETIONS, completion(**{key: value})) for key, value in TOO_LONG.items()]
    with Witness(server) as witness:
        replies = send_all(server, asked)
    assert witness.answers == {answer}
    for (key, _), reply in zip(TOO_LONG.items(), replies, strict=True):
        if front_end == "python":
            assert reply.status == 400, reply
            assert re.search(f"too many entries: {key}.*at most 1,024", reply.text), reply
        else:  # Rust sends some of them otherwise, or learns from the engine that it cannot
            assert reply.status in (200, 400, 500), reply


# Prompts, names and pictures


def test_prompts_at_the_limits(server: Server, front_end: str, answer: str) -> None:
    prompts = [
        (tokens[1:], 1, 200),
        (tokens[2:], 2, 200),
        (tokens, 1, 400),
        ([*tokens, 5], 1, 400),
        ([VOCABULARY], 4, 400),
        ([-1], 4, 400),
        ([], 4, 400),
    ]
    asked = [Call(COMPLETIONS, completion(prompt, max_tokens=n)) for prompt, n, _ in prompts]
    replies = attack(server, front_end, answer, asked)
    assert [reply.status for reply in replies] == [status for *_, status in prompts]


@pytest.mark.parametrize(
    "name",
    [b"twice", b"x" * 300, b"x" * 10_000, b"../../a/b", b"%0d%0a", b"\xff\xfe", "é\u202e".encode()],
    ids=["twice", "long", "longer", "path", "escapes", "bytes", "marks"],
)
def test_requests_of_one_name_at_once(
    server: Server, front_end: str, answer: str, name: bytes
) -> None:
    """Their kept sets are recorded in files, which cannot have all of these names."""
    asked = [Call(COMPLETIONS, completion(), {"x-request-id": name})] * AT_ONCE
    for reply in attack(server, front_end, answer, asked):
        assert reply.status in (200, 400, 409), reply


def test_pictures_of_any_kind(server: Server, front_end: str, answer: str) -> None:
    urls = list(picture_urls().values())
    asked = [Call(CHAT, chat(url)) for url in urls]
    asked += [Call(CHAT, chat(*[URLS["good"]] * count)) for count in (4, 5)]
    *_, most, too_many = attack(server, front_end, answer, asked)
    assert most.status == 200, most
    assert too_many.status == 400, too_many


# Clients without manners


@pytest.mark.parametrize("rude", RUDE, ids=lambda rude: str(rude.__name__))
def test_a_client_that_leaves(server: Server, answer: str, rude: Any) -> None:
    with Witness(server) as witness, ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(rude, server) for _ in range(4)]:
            future.result()
    assert witness.answers == {answer}
    assert max(witness.seconds) < PATIENCE
