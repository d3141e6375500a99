"""Clients that misbehave, one that behaves well beside them, and a server left to itself."""

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from sparsemm_vllm.commands.client import metric
from sparsemm_vllm.commands.server import HOST, Server
from support.hostile import CHAT, COMPLETIONS, URLS, Call, chat, completion


@dataclass(frozen=True)
class Reply:
    """What a server answered; status 0 if it closed the connection without an answer."""

    status: int
    text: str
    seconds: float


def send(server: Server, call: Call, timeout: float = 60.0) -> Reply:
    """Send a request over a connection of its own and read all of the answer."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection(HOST, server.port, timeout=timeout)
    try:
        headers = {"content-type": b"application/json"} | call.headers
        connection.request("POST", call.path, call.content(), headers)
        response = connection.getresponse()
        status, text = response.status, response.read().decode(errors="replace")
    except (http.client.HTTPException, ConnectionError):
        status, text = 0, ""
    finally:
        connection.close()
    return Reply(status, text, time.monotonic() - begun)


def raw_request(call: Call, length: int | None = None) -> bytes:
    """The bytes of a request.

    Args:
        call: call to make.
        length: length that its header claims, of the content if none.
    """
    content = call.content()
    head = (
        f"POST {call.path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content) if length is None else length}\r\n\r\n"
    )
    return head.encode() + content


@contextmanager
def connection(server: Server, buffer: int | None = None) -> Iterator[socket.socket]:
    """A TCP connection that ends with a reset, as that of a client that was killed.

    Args:
        server: server to connect to.
        buffer: bytes that the client's side keeps unread; the system's own number if none.
    """
    with socket.socket() as own:
        if buffer is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        own.settimeout(60)
        own.connect((HOST, server.port))
        yield own


LONG_ANSWER = Call(COMPLETIONS, completion(max_tokens=400, ignore_eos=True, stream=True))


def cut_body_off(server: Server) -> None:
    """Send less than the header promised."""
    with connection(server) as own:
        own.sendall(raw_request(LONG_ANSWER, length=10_000))


def hang_up_at_once(server: Server) -> None:
    """Send a whole request, and go while its prompt is computed."""
    with connection(server) as own:
        own.sendall(raw_request(LONG_ANSWER))


def hang_up_in_the_answer(server: Server) -> None:
    """Go after the first bytes of a streamed answer."""
    with connection(server) as own:
        own.sendall(raw_request(LONG_ANSWER))
        assert own.recv(64)


def read_slowly(server: Server) -> None:
    """Let the answer wait in a small buffer, and go without reading most of it."""
    with connection(server, buffer=2048) as own:
        own.sendall(raw_request(LONG_ANSWER))
        assert own.recv(64)
        time.sleep(2)


def pipeline_and_go(server: Server) -> None:
    """Send many requests over one connection without waiting for answers, and go."""
    with connection(server) as own:
        own.sendall(raw_request(LONG_ANSWER) * 8)
        time.sleep(0.2)


def send_a_picture_and_go(server: Server) -> None:
    """Go while a picture is read."""
    with connection(server) as own:
        own.sendall(raw_request(Call(CHAT, chat(URLS["a line"], URLS["good"], stream=True))))


RUDE = (
    cut_body_off, hang_up_at_once, hang_up_in_the_answer, read_slowly, pipeline_and_go,
    send_a_picture_and_go,
)  # fmt: skip


class Witness(threading.Thread):
    """A well-behaved client that asks one question again and again until it is stopped.

    Attributes:
        answers: all different answers that it got.
        seconds: time of each answer.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.answers: set[str] = set()
        self.seconds: list[float] = []
        self._server = server
        self._over = threading.Event()

    def __enter__(self) -> "Witness":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Ask, at least once."""
        while True:
            reply = probe(self._server)
            self.answers.add(reply.text)
            self.seconds.append(reply.seconds)
            if self._over.wait(0.05):
                return


def probe(server: Server) -> Reply:
    """Ask the fixed question about a picture; the text of the reply is what was answered."""
    reply = send(server, Call(CHAT, chat(URLS["good"], max_tokens=8)))
    if reply.status != 200:
        return reply
    return Reply(200, json.loads(reply.text)["choices"][0]["message"]["content"], reply.seconds)


def wait_until_idle(server: Server, patience: float = 60.0) -> None:
    """Wait until no request is left and every block is free.

    Raises:
        AssertionError: naming what was not as it should be after so many seconds.
    """
    deadline = time.monotonic() + patience
    while busy := _busy(httpx.get(f"{server.url}/metrics", timeout=patience).text):
        assert time.monotonic() < deadline, f"not idle after {patience:.0f} s: {busy}"
        time.sleep(0.1)


def _busy(page: str) -> dict[str, float]:
    names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    numbers = {name: metric(page, name) for name in names}
    if "sparsemm:" in page:
        numbers["held blocks"] = metric(page, "sparsemm:held_blocks")
        free = metric(page, "sparsemm:free_blocks")
        numbers["blocks that are not free"] = metric(page, "sparsemm:pool_blocks") - free
    return {name: number for name, number in numbers.items() if number}
