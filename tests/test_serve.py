"""`sparsemm serve` and `sparsemm demo` as a user runs them, clients and faults included."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engines import WINDOW, serve_options, settings
from PIL import Image
from tiny import picture

from sparsemm_vllm.client import data_url, metric
from sparsemm_vllm.server import Server, ServerError

pytestmark = pytest.mark.engine

SPARSEMM = Path(sys.executable).parent / "sparsemm"
PATIENCE = 240  # seconds; the other test process may start engines too


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("served") / "log"
    listed = {"VLLM_PLUGINS": "sparsemm,sparsemm_page"}
    with Server(str(model), serve_options(settings(40)), log, listed) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


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
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages("what does it say?", data_url(picture(1))),
        temperature=0,
        max_tokens=8,
        stream=True,
    )
    parts = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert "".join(parts) == ask(client)


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


def test_server_that_dies_says_why(tmp_path: Path) -> None:
    with Server("no-such-folder", [], tmp_path / "log") as dying:
        with pytest.raises(ServerError, match="ended with code 1") as error:
            dying.wait_until_ready(timeout=120)
        last = dying.log.read_text().strip().splitlines()[-1]
    assert str(error.value).endswith(last)


def _demo(out: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(SPARSEMM), "demo", "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=out,
        env=os.environ | {"COLUMNS": "120"},
    )


def _processes_with(text: str) -> list[int]:
    """Running processes whose command line holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text in command:
                found.append(int(entry.name))
    return found


def test_demo(tmp_path: Path) -> None:
    demo = _demo(tmp_path, "--seed", "5")
    output, _ = demo.communicate(timeout=600)
    assert demo.returncode == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["true_text"] in output
    assert report["answer"] in output
    kept, blocks = report["kept_per_head"], report["kv_blocks"]
    assert kept["min"] < kept["median"] < kept["max"] <= report["prompt_tokens"]
    assert blocks["after_pruning"] < blocks["dense"] < blocks["while_pruning"]
    if blocks["seen_in_metrics"] is not None:  # fast answers are over between two readings
        assert blocks["seen_in_metrics"] == [blocks["while_pruning"], blocks["after_pruning"]]
    for name in ("picture.png", "report.png"):
        with Image.open(tmp_path / name) as image:
            image.verify()
    assert not _processes_with(str(tmp_path))


@pytest.mark.parametrize(
    ("sign", "begun"),
    [
        (signal.SIGINT, "APIServer"),
        pytest.param(signal.SIGINT, "EngineCore", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "EngineCore", marks=pytest.mark.slow),
    ],
)
def test_interrupted_demo_stops_its_server(
    tmp_path: Path, sign: signal.Signals, begun: str
) -> None:
    """While it starts, before and after it has an engine in a process of its own."""
    demo = _demo(tmp_path)
    log = tmp_path / "server.log"
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and begun in log.read_text()):
        assert time.monotonic() < deadline, "the server did not start"
        assert demo.poll() is None
        time.sleep(0.2)
    assert len(_processes_with(str(tmp_path))) > 1
    demo.send_signal(sign)
    output, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 130, output
    assert "the server is stopped" in output
    assert not _processes_with(str(tmp_path))


def test_demo_whose_server_dies_shows_its_log(tmp_path: Path) -> None:
    demo = _demo(tmp_path)
    deadline = time.monotonic() + PATIENCE
    while len(served := [p for p in _processes_with(str(tmp_path)) if p != demo.pid]) == 0:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.1)
    log = tmp_path / "server.log"
    while not log.read_text().strip():
        assert time.monotonic() < deadline, "the server logged nothing"
        time.sleep(0.1)
    for process in served:
        os.kill(process, signal.SIGKILL)
    output, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 1, output
    assert "the server ended with code -9" in output
    assert log.read_text().strip().splitlines()[-1][:60] in output
    assert not _processes_with(str(tmp_path))


def test_demo_refuses_a_budget_below_its_window(tmp_path: Path) -> None:
    demo = _demo(tmp_path, "--budget", "10")
    output, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 2
    assert "--budget must be larger than the window" in output
