"""Single requests: what warms a server up, and what chats wait for that come back.

`vllm bench serve` knows no second turns with pictures, so these are asked here, one at a time.
"""

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from speed.load import SERVED, LoadError
from speed.scenarios import QUESTION, Chats, Size, write_pictures

SECOND_QUESTION = "And what else can be seen, from left to right and from top to bottom?"
TIMEOUT = 1800  # seconds; a first request may wait for kernels to be compiled
WARM_UP_TOKENS = 16
CACHES = ("prefix", "mm", "encoder")

Message = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: text of the answer.
        ttft_ms: time from sending the question to the first token, in milliseconds.
        prompt_tokens: tokens of the question, with all that precedes it.
        cached_tokens: tokens of these that the prefix cache had.
    """

    text: str
    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int


def question(pictures: list[Path], text: str) -> Message:
    """A user's message; the pictures come first."""
    parts = [{"type": "image_url", "image_url": {"url": file.as_uri()}} for file in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def ask(url: str, messages: list[Message], tokens: int) -> Reply:
    """Ask for a greedy answer of this many tokens.

    Raises:
        LoadError: if the server refuses.
    """
    body = {
        "model": SERVED,
        "messages": messages,
        "max_completion_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, first, usage = "", None, None
    start = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT) as answer:
        if answer.is_error:
            raise LoadError(f"the server refused: {answer.read().decode()}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if choices := chunk["choices"]:
                first = first or time.perf_counter()
                text += choices[0]["delta"].get("content") or ""
            usage = chunk.get("usage") or usage
    assert first is not None
    assert usage is not None
    details = usage["prompt_tokens_details"]
    cached = details["cached_tokens"] if details else 0  # vLLM leaves them out if there are none
    return Reply(text, 1000 * (first - start), usage["prompt_tokens"], cached)


def warm_up(url: str, folder: Path, sizes: tuple[Size, ...], requests: int) -> None:
    """Answer requests of a kind, all at once, then let the server forget them."""

    def one(number: int) -> None:
        pictures = write_pictures(folder, sizes, "warm-up", *map(str, sizes), number)
        ask(url, [question(pictures, QUESTION.format(number))], WARM_UP_TOKENS)

    with ThreadPoolExecutor(requests) as pool:
        list(pool.map(one, range(requests)))
    forget(url)


def forget(url: str, patience: float = 60.0) -> None:
    """Empty a server's caches, so that what was asked before does not matter.

    Args:
        url: address of a server that runs with ``VLLM_SERVER_DEV_MODE=1``.
        patience: time to try, in seconds; until the last request has given its blocks back, vLLM
            refuses.

    Raises:
        TimeoutError: if requests are running.
    """
    deadline = time.monotonic() + patience
    for cache in CACHES:
        while True:
            done = httpx.post(f"{url}/reset_{cache}_cache", timeout=TIMEOUT).raise_for_status()
            if not done.content or done.json()["success"]:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"the {cache} cache was not emptied within {patience:.0f} s")
            time.sleep(0.1)


def hold_chats(url: str, folder: Path, chats: Chats) -> dict[str, float]:
    """Ask about new pictures, ask the same again, then go on with the chat.

    Returns:
        A cell: medians of the times to the first token, and means of the tokens.
    """
    asked: dict[str, list[Reply]] = {"cold": [], "again": [], "second_turn": []}
    for number in range(chats.count):
        pictures = write_pictures(folder, chats.pictures, "chats", number)
        first = question(pictures, QUESTION.format(number))
        answer = ask(url, [first], chats.output_tokens)
        said = {"role": "assistant", "content": answer.text}
        second = [first, said, question([], SECOND_QUESTION)]
        asked["cold"].append(answer)
        asked["again"].append(ask(url, [first], 1))
        asked["second_turn"].append(ask(url, second, 1))
    cell: dict[str, float] = {"chats": chats.count, "output_tokens": chats.output_tokens}
    for name, replies in asked.items():
        cell[f"{name}_ttft_p50_ms"] = round(statistics.median(r.ttft_ms for r in replies), 3)
        for tokens in ("prompt_tokens", "cached_tokens"):
            mean = statistics.fmean(getattr(reply, tokens) for reply in replies)
            cell[f"{name}_{tokens}_mean"] = round(mean, 1)
    return cell
