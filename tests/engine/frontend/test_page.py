"""The page and the metrics of a server with two API servers, looked at as an operator does.

CI looks at those of one API server: test_serve.py.
"""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from sparsemm_vllm.commands.server import Server
from sparsemm_vllm.engine.frontend.page import SparseMMPage
from sparsemm_vllm.engine.scheduler.stats import Outcome
from support.engines import serve_options, settings
from support.tiny import KV_HEADS

BUDGET = 40
SECRET = "what the client asked"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def of_a_server(test: Any) -> Any:
    return pytest.mark.engine(pytest.mark.slow(test))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    words = serve_options(settings(BUDGET), api_server_count="2")
    listed = {"VLLM_PLUGINS": "sparsemm,sparsemm_page"}
    with Server(str(model), words, tmp_path_factory.mktemp("page") / "log", listed) as running:
        running.wait_until_ready()
        for text, requests in ((SECRET * 6, 6), ("hi", 2)):
            for _ in range(requests):
                answer = httpx.post(
                    f"{running.url}/v1/completions",
                    json={"model": "tiny", "prompt": text, "max_tokens": 4, "temperature": 0},
                    timeout=60,
                )
                answer.raise_for_status()
        yield running


def stats(server: Server) -> dict[str, Any]:
    """From whichever API server takes the connection."""
    return httpx.get(f"{server.url}/sparsemm/stats.json").raise_for_status().json()


@of_a_server
def test_every_api_server_says_the_same(server: Server) -> None:
    answers = [stats(server) for _ in range(8)]
    for answer in answers:
        answer.pop("time")
        assert answer == answers[0]
    (told, *_) = answers
    assert told["requests"] == dict.fromkeys(Outcome, 0) | {"pruned": 6, "too_short": 2}
    assert told["prompt_tokens"]["pruned"] > told["kept_tokens"]["pruned"] > 0
    assert told["blocks"]["held"] == told["blocks"]["dense"] == 0
    assert told["blocks"]["free"] == told["blocks"]["pool"] > 0
    assert told["prune_seconds"] > 0
    assert told["settings"] == {
        "method": "sparsemm", "budget": "40", "window": "8", "profile": "tiny"
    }  # fmt: skip
    assert {len(layer) for layer in told["budgets"]} == {KV_HEADS}
    assert [record["outcome"] for record in told["recent"]] == ["too_short"] * 2 + ["pruned"] * 6
    assert all(record["finished"] for record in told["recent"])


@of_a_server
def test_metrics_add_up_over_api_servers(server: Server) -> None:
    for _ in range(4):
        page = httpx.get(f"{server.url}/metrics").text
        lines = [line for line in page.splitlines() if line.startswith("sparsemm:requests_total")]
        (pruned,) = [line for line in lines if 'outcome="pruned"' in line]
        assert pruned.endswith(" 6.0")
        assert 'engine="0"' in pruned
        assert 'model_name="tiny"' in pruned
        assert page.count("\nsparsemm:held_blocks{") == 1


@of_a_server
def test_no_prompt_and_nothing_from_elsewhere(server: Server) -> None:
    page = httpx.get(f"{server.url}/sparsemm")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert set(re.findall(r"\w+://[^\"']*", page.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|\ssrc=", page.text)
    assert SECRET not in page.text + json.dumps(stats(server))


@of_a_server
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_in_a_browser(server: Server, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", f"{server.url}/sparsemm"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    dom = done.stdout
    told = stats(server)
    assert '<p id="state" class="">live</p>' in dom, done.stderr
    assert "<b>6</b><span>of 8 requests pruned</span>" in dom
    assert "<b>idle</b>" in dom
    assert dom.count("<rect") == sum(map(len, told["budgets"]))
    largest = max(map(max, told["budgets"]))
    assert f"{largest} tokens</title>" in dom
    for record in told["recent"]:
        assert f'title="{record["request_id"]}"' in dom
    assert SECRET not in dom


@pytest.fixture
def app() -> FastAPI:
    made = FastAPI()
    SparseMMPage().attach_router(made)
    return made


@pytest.mark.parametrize("client", [None, SimpleNamespace(logger_manager=None)])
def test_server_that_counts_nothing(app: FastAPI, client: Any) -> None:
    asyncio.run(SparseMMPage().init_state(client, app.state, None))
    for path in ("/sparsemm", "/sparsemm/stats.json"):
        answer = TestClient(app).get(path)
        assert answer.status_code == 404
        assert "does not use SPARSEMM" in answer.json()["detail"]
