"""Stand-ins for vLLM's client; a module of its own, since its process has to import it."""

import asyncio
import os
import time


def fails_once(arguments: list[str], timeout: float) -> None:
    if arguments != ["--again"]:
        raise ValueError("no such data set")


def exits(arguments: list[str], timeout: float) -> None:
    raise SystemExit(2)


def dies(arguments: list[str], timeout: float) -> None:
    os._exit(1)


def hangs(arguments: list[str], timeout: float) -> None:
    begin = time.monotonic()
    try:
        asyncio.run(asyncio.wait_for(asyncio.sleep(600), timeout))
    finally:
        assert time.monotonic() - begin < 60
