"""One of two tensor-parallel workers is slow, and then killed."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from sparsemm_vllm.commands.server import Server
from support.children import PYTHONPATH
from support.engines import serve_options, settings
from support.hostile_clients import (
    LONG_ANSWER,
    Reply,
    connection,
    hang_up_in_the_answer,
    probe,
    raw_request,
    wait_until_idle,
)

pytestmark = pytest.mark.engine

STEP = 2.0  # seconds
ENDED = 60.0  # seconds until everything must have ended after a worker was killed


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = serve_options(
        settings(40),
        tensor_parallel_size="2",
        worker_extension_cls="support.slow_worker.SlowWorker",
    )
    variables = {"VLLM_SERVER_DEV_MODE": "1"} | PYTHONPATH
    with Server(str(model), options, tmp_path_factory.mktemp("tp2") / "log", variables) as running:
        running.wait_until_ready()
        yield running


def take(server: Server, seconds: float) -> None:
    """Make the steps of the second rank take so much longer."""
    asked = {"method": "take", "kwargs": {"seconds": seconds, "rank": 1}}
    httpx.post(f"{server.url}/collective_rpc", json=asked, timeout=60).raise_for_status()


@pytest.fixture
def quick(server: Server) -> Iterator[Reply]:
    """The fixed question's answer at full speed; then the second rank is slow."""
    reply = probe(server)
    assert reply.status == 200, reply
    take(server, STEP)
    yield reply
    take(server, 0.0)


def test_a_slow_rank_gives_the_same_answer(server: Server, quick: Reply) -> None:
    slow = probe(server)
    assert slow.seconds > 4 * STEP, "the worker was not slow"
    assert slow.text == quick.text
    wait_until_idle(server)


def test_metrics_and_aborts_while_a_rank_is_slow(server: Server, quick: Reply) -> None:
    with connection(server) as own:
        own.sendall(raw_request(LONG_ANSWER))
        assert own.recv(64)
        begun = time.monotonic()
        assert "sparsemm:held_blocks" in httpx.get(f"{server.url}/metrics", timeout=60).text
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        assert time.monotonic() - begun < STEP, "the front end waits for the worker"
    hang_up_in_the_answer(server)
    wait_until_idle(server, patience=8 * STEP)


def test_a_killed_rank_ends_all_processes(server: Server) -> None:
    """The client is told, the log says why, and nothing is left. The last test."""
    family = psutil.Process(server.pid).children(recursive=True)
    workers = [child for child in family if "Worker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    with connection(server) as own:
        own.sendall(raw_request(LONG_ANSWER))
        assert own.recv(64)
        workers[1].kill()
        deadline = time.monotonic() + ENDED
        received = b""
        while part := own.recv(65536):
            received += part
    assert b"error" in received[-2000:].lower(), received[-2000:]
    while server.code is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.code is not None, "the server did not end"
    _, left = psutil.wait_procs(family, timeout=max(0.0, deadline - time.monotonic()))
    assert not left
    assert re.search(r"Worker proc .* died", server.log.read_text()), server.last_lines()
