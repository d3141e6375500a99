"""A server and its clients; then faults: it goes on, or ends and says why, as vLLM does."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from sparsemm_vllm.budget.profile import save_profile
from sparsemm_vllm.commands.client import data_url, metric
from sparsemm_vllm.commands.server import Server, ServerError
from support.engines import WINDOW, serve_options, settings
from support.tiny import picture, skewed_profile

pytestmark = pytest.mark.engine

BUDGET = 40
TEXT = "a prompt without a picture that is much longer than what is kept of it"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head profile that the server is given by name."""
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    save_profile(skewed_profile(), path)
    return path


@pytest.fixture(scope="module")
def server(
    model: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    options = serve_options(settings(BUDGET, profile=str(profile)))
    log = tmp_path_factory.mktemp("served") / "log"
    variables = {"VLLM_PLUGINS": "sparsemm,sparsemm_page", "VLLM_SERVER_DEV_MODE": "1"}
    with Server(str(model), options, log, variables) as running:
        running.wait_until_ready()
        yield running


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return connect(server)


def messages(text: str, image: str | None = None) -> Any:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": image}})
    return [{"role": "user", "content": content}]


def blocks_in_use(server: Server) -> float:
    return metric(httpx.get(f"{server.url}/metrics").text, "vllm:kv_cache_usage_perc")


def ask(client: openai.OpenAI, max_tokens: int = 8, **extra_body: Any) -> str | None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages("what does it say?", data_url(picture(1))),
        temperature=0,
        max_tokens=max_tokens,
        extra_body=extra_body,
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 64 + WINDOW
    return answer.choices[0].message.content


def stream(client: openai.OpenAI, max_tokens: int = 8, **extra_body: Any) -> Iterator[Any]:
    """The choices of the chunks in which the answer of `ask` comes."""
    chunks = client.chat.completions.create(
        model="tiny",
        messages=messages("what does it say?", data_url(picture(1))),
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        extra_body=extra_body,
    )
    return (choice for chunk in chunks for choice in chunk.choices)


def test_answers_are_repeatable_and_leave_nothing_behind(
    server: Server, client: openai.OpenAI
) -> None:
    assert ask(client) == ask(client)
    assert blocks_in_use(server) == 0


def test_metrics_of_a_spawned_engine(server: Server, client: openai.OpenAI) -> None:
    def pruned(name: str) -> float:
        page = httpx.get(f"{server.url}/metrics").text
        return metric(page, f"sparsemm:{name}", outcome="pruned")

    before = pruned("requests_total")
    assert ask(client)
    assert pruned("requests_total") == before + 1
    assert 0 < pruned("kept_tokens_total") < pruned("prompt_tokens_total")
    page = httpx.get(f"{server.url}/metrics").text
    assert metric(page, "sparsemm:freed_blocks_total") > 0
    assert metric(page, "sparsemm:prune_seconds_total") > 0
    assert metric(page, "sparsemm:held_blocks") == 0


def test_page_of_a_spawned_engine(server: Server, client: openai.OpenAI) -> None:
    assert ask(client)
    told = httpx.get(f"{server.url}/sparsemm/stats.json").raise_for_status().json()
    pruned = metric(
        httpx.get(f"{server.url}/metrics").text, "sparsemm:requests_total", outcome="pruned"
    )
    assert told["requests"]["pruned"] == pruned > 0
    assert told["recent"][0]["outcome"] == "pruned"
    assert told["blocks"]["free"] == told["blocks"]["pool"] > 0
    page = httpx.get(f"{server.url}/sparsemm")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "does it say" not in page.text + json.dumps(told)


def test_streaming(server: Server, client: openai.OpenAI) -> None:
    parts = [choice.delta.content or "" for choice in stream(client)]
    assert "".join(parts) == ask(client)


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_pause_and_resume(server: Server, client: openai.OpenAI, mode: str) -> None:
    """A request that decodes goes on after the pause, ends before it, or is aborted by it."""
    tokens = 200
    alone = ask(client, tokens, ignore_eos=True)
    choices = stream(client, tokens, ignore_eos=True)
    parts = [next(choices).delta.content or "" for _ in range(8)]
    answer = httpx.post(f"{server.url}/pause", params={"mode": mode}, timeout=60)
    assert answer.raise_for_status().json() == {"status": "paused"}
    if mode != "keep":
        assert blocks_in_use(server) == 0
        with pytest.raises(openai.InternalServerError, match="paused"):
            ask(client)
    httpx.post(f"{server.url}/resume").raise_for_status()
    rest = list(choices)
    text = "".join(parts + [choice.delta.content or "" for choice in rest])
    assert alone is not None
    if mode == "abort":
        assert rest[-1].finish_reason == "abort"
        assert alone.startswith(text)
        assert len(text) < len(alone)
    else:
        assert rest[-1].finish_reason == "length"
        assert text == alone
    assert ask(client, tokens, ignore_eos=True) == alone
    assert blocks_in_use(server) == 0


@pytest.mark.parametrize(
    ("request_messages", "what"),
    [
        (messages("x" * 600), "maximum context length"),
        (messages("what?", "data:image/png;base64,AAAA"), "image"),
    ],
    ids=["prompt too long", "unreadable image"],
)
def test_bad_requests_get_vllms_own_errors(
    server: Server, client: openai.OpenAI, request_messages: Any, what: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=what):
        client.chat.completions.create(model="tiny", messages=request_messages, max_tokens=4)
    assert ask(client)
    assert blocks_in_use(server) == 0


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"sparsemm": 5}, "sparsemm: Input should be less than or equal to 1"),
        ({"sparsemm_budget": 81}, "sparsemm_budget: 81 tokens; this server takes 9 to 80"),
        ({"sparsemm_budget": "many"}, "sparsemm_budget: Input should be a valid integer"),
        ({"sparsemm_bugdet": 40}, "did you mean 'sparsemm_budget'"),
    ],
)
def test_request_settings_that_cannot_be_are_refused(
    server: Server, client: openai.OpenAI, asked: dict[str, Any], what: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=what):
        client.chat.completions.create(
            model="tiny", messages=messages("what?"), extra_body={"vllm_xargs": asked}
        )
    assert ask(client)
    assert blocks_in_use(server) == 0


def test_requests_have_settings_of_their_own(client: openai.OpenAI) -> None:
    """Three answers to the same question, by what is kept of it."""
    answers = {
        ask(client, max_tokens=24, vllm_xargs=asked)
        for asked in ({}, {"sparsemm": False}, {"sparsemm_budget": 60})
    }
    assert len(answers) == 3


def test_disconnect_frees_the_blocks(server: Server, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages("what does it say?", data_url(picture(2))),
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert blocks_in_use(server) > 0
    stream.close()
    deadline = time.monotonic() + 20
    while blocks_in_use(server) > 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert blocks_in_use(server) == 0


def complete(client: openai.OpenAI) -> str:
    answer = client.completions.create(model="tiny", prompt=TEXT, temperature=0, max_tokens=12)
    return answer.choices[0].text


def test_the_profile_file_may_change_while_it_is_served(
    server: Server, client: openai.OpenAI, profile: Path
) -> None:
    before = complete(client)
    contents = profile.read_text()
    even = skewed_profile().model_copy(update={"scores": ((1.0,) * 8,) * 4})
    for changed in (even.model_dump_json(), contents[:50], "", None):
        if changed is None:
            profile.unlink()
        else:
            profile.write_text(changed)
        httpx.post(f"{server.url}/reset_prefix_cache").raise_for_status()
        assert complete(client) == before


def kill_while_it_decodes(server: Server, name: str, count: int = 1) -> None:
    """End the first of so many processes whose command line has the name; the server must end."""
    stream = connect(server).completions.create(
        model="tiny",
        prompt=TEXT,
        temperature=0,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    children = psutil.Process(server.pid).children(recursive=True)
    named = [child for child in children if name in " ".join(child.cmdline())]
    assert len(named) == count
    named[0].kill()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        for _ in stream:
            pass
    with pytest.raises(ServerError, match=r"ended with code"):
        server.check_alive(patience=60)
    log = server.log.read_text()
    assert re.search(r"Engine core .*died|EngineDeadError", log), log[-2000:]


def test_an_engine_killed_while_it_decodes_ends_the_server(server: Server) -> None:
    """The client is told and the server ends, as it does with dense attention. The last test."""
    kill_while_it_decodes(server, "EngineCore")


@pytest.mark.slow
def test_one_of_two_workers_killed_while_it_decodes_ends_the_server(
    model: Path, tmp_path: Path
) -> None:
    options = serve_options(settings(BUDGET), tensor_parallel_size="2")
    with Server(str(model), options, tmp_path / "log") as server:
        server.wait_until_ready()
        kill_while_it_decodes(server, "Worker", count=2)
