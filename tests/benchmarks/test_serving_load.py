"""What a load is made of: vLLM's client, a server's metrics, and chats; without either of them."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from speed import load as load_module
from speed.chat import SECOND_QUESTION, ask, forget, hold_chats
from speed.load import Bench, LoadError, numbers, watch
from speed.scenarios import Chats, Load, Scenario

from support import fake_benches

SMALL = ((48, 32), (30, 45))
UNIQUE = Scenario("unique", "its own pictures", SMALL, None, 8, (Load("inf", 5),))
RESULT = {
    "completed": 5,
    "failed": 0,
    "total_input_tokens": 2130,
    "total_output_tokens": 40,
    "duration": 2.0,
    "request_throughput": 2.5,
    "output_throughput": 20.0,
    "total_token_throughput": 1085.0,
    "p50_ttft_ms": 100.0,
    "p99_ttft_ms": 190.123456,
    "p50_tpot_ms": 10.0,
    "p99_tpot_ms": 12.0,
    "latencies": [1, 2, 3, 4, 5],
}


# What vLLM's client says


def test_numbers_of_a_result() -> None:
    cell = numbers(RESULT, UNIQUE, Load("inf", 5))
    assert cell == {
        "requests": 5,
        "prompt_tokens_mean": 426.0,
        "output_tokens": 8,
        "seconds": 2.0,
        "requests_per_second": 2.5,
        "output_tokens_per_second": 20.0,
        "total_tokens_per_second": 1085.0,
        "ttft_p50_ms": 100.0,
        "ttft_p99_ms": 190.1235,
        "tpot_p50_ms": 10.0,
        "tpot_p99_ms": 12.0,
    }


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"completed": 3, "failed": 2}, "2 of 5 requests failed"),
        ({"total_output_tokens": 39}, "39 tokens were answered, not 40"),
    ],
)
def test_results_that_cannot_be_trusted(changes: dict[str, int], what: str) -> None:
    with pytest.raises(LoadError, match=what):
        numbers(RESULT | changes, UNIQUE, Load("inf", 5))


def test_a_failed_bench_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "_run", fake_benches.fails_once)
    with closing(Bench(tmp_path / "log")) as bench:
        with pytest.raises(LoadError, match=r"(?s)failed:\n.*fake_benches.*: no such data set"):
            bench.run(["--wrong"], timeout=120)
        bench.run(["--again"], timeout=120)


@pytest.mark.parametrize(
    ("target", "timeout", "what"),
    [
        (fake_benches.dies, 120, "died"),
        (fake_benches.exits, 120, "failed"),
        (fake_benches.hangs, 0.2, "not done after 0 s"),
    ],
)
def test_a_bench_that_is_gone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Callable[..., None],
    timeout: float,
    what: str,
) -> None:
    monkeypatch.setattr(load_module, "_run", target)
    with closing(Bench(tmp_path / "log")) as bench, pytest.raises(LoadError, match=what) as error:
        bench.run([], timeout)
    assert what == "failed" or str(tmp_path / "log") in str(error.value)


# A server of few words


PAGE = """
vllm:num_requests_running{{engine="0"}} {running}
vllm:kv_cache_usage_perc{{engine="0"}} {usage}
vllm:num_preemptions_total{{engine="0"}} {preemptions}
vllm:cache_config_info{{engine="0",num_gpu_blocks="115"}} 1.0
"""


class FakeServer(ThreadingHTTPServer):
    """Answers as vLLM does, as far as it is asked here."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.page, self.reads = "", 0
        self.bodies: list[dict[str, Any]] = []
        self.resets: list[str] = []
        self.busy = 0


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def reply(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self.reply(self.server.page)
        self.server.reads += 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/reset"):
            self.server.resets.append(self.path)
            self.server.busy -= 1
            prefix = self.path == "/reset_prefix_cache"
            self.reply(json.dumps({"success": self.server.busy < 0}) if prefix else "")
            return
        asked = json.loads(body)
        self.server.bodies.append(asked)
        if asked["max_completion_tokens"] > 100:
            self.reply("too long", status=400)
            return
        words = ["", "so ", "it is"]
        usage = {"prompt_tokens": 50, "prompt_tokens_details": None}
        if len(self.server.bodies) > 1:
            usage["prompt_tokens_details"] = {"cached_tokens": 32}
        chunks = [{"choices": [{"delta": {"content": word}}]} for word in words]
        lines = [json.dumps(c) for c in [*chunks, {"choices": [], "usage": usage}]] + ["[DONE]"]
        self.reply("".join(f"data: {line}\n\n" for line in lines))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def page(running: int, usage: float, preemptions: int, pruned: int | None = None) -> str:
    text = PAGE.format(running=running, usage=usage, preemptions=preemptions)
    if pruned is not None:
        text += f'sparsemm:requests_total{{outcome="pruned"}} {pruned}.0\n'
        text += 'sparsemm:requests_total{outcome="too_short"} 77.0\n'
    return text


@pytest.mark.parametrize("pruned", [None, 4])
def test_a_server_is_watched(server: FakeServer, pruned: int | None) -> None:
    server.page = page(0, 0.0, 3, pruned)
    with watch(server.url, seconds=0.01) as watched:
        for running, usage in ((2, 0.5), (7, 0.25), (4, 0.98), (0, 0.0)):
            server.page = page(running, usage, 5, pruned and pruned + 6)
            enough = server.reads + 10
            while server.reads < enough:
                time.sleep(0.001)
    found = watched.readings
    assert (found["running_requests_peak"], found["kv_usage_peak_share"]) == (7, 0.98)
    assert 3.5 < found["running_requests_mean"] < 5, "idle readings do not count"
    assert 0.45 < found["kv_usage_mean_share"] < 0.7
    assert watched.counted("vllm:num_preemptions_total") == 2
    assert watched.blocks == 115
    assert watched.pruned == (0 if pruned is None else 6)


def test_metrics_that_are_missing_are_an_error(server: FakeServer) -> None:
    server.page = "vllm:num_requests_walking 1.0"
    with (
        pytest.raises(ValueError, match="no vllm:num_requests_running"),
        watch(server.url, seconds=0.01),
    ):
        time.sleep(0.3)


def test_chats(server: FakeServer, tmp_path: Path) -> None:
    cell = hold_chats(server.url, tmp_path, Chats(SMALL, output_tokens=6, count=2))
    assert len(server.bodies) == 6
    first, again, second = server.bodies[:3]
    assert again["messages"] == first["messages"]
    assert second["messages"][:1] == first["messages"]
    assert second["messages"][1] == {"role": "assistant", "content": "so it is"}
    assert second["messages"][2]["content"] == [{"type": "text", "text": SECOND_QUESTION}]
    assert [body["max_completion_tokens"] for body in server.bodies[:3]] == [6, 1, 1]
    assert server.bodies[3]["messages"] != first["messages"]
    for part in first["messages"][0]["content"][:2]:
        assert Path(part["image_url"]["url"].removeprefix("file://")).exists()
    assert cell["cold_ttft_p50_ms"] > 0
    assert cell["cold_cached_tokens_mean"] == 16, "the first has no details, the fourth 32"
    assert cell["second_turn_cached_tokens_mean"] == 32
    assert cell["second_turn_prompt_tokens_mean"] == 50


def test_a_refusal_is_told(server: FakeServer) -> None:
    with pytest.raises(LoadError, match="refused: too long"):
        ask(server.url, [], tokens=101)


def test_caches_are_emptied(server: FakeServer) -> None:
    server.busy = 2
    forget(server.url)
    assert server.resets == [
        *["/reset_prefix_cache"] * 3,
        "/reset_mm_cache",
        "/reset_encoder_cache",
    ]
    server.busy = 10**6
    with pytest.raises(TimeoutError, match="prefix cache was not emptied"):
        forget(server.url, patience=0.2)
