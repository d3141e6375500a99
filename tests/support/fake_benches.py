"""Stand-ins for vLLM's client; a module of its own, since its process has to import it."""

import time
from multiprocessing.connection import Connection
from pathlib import Path


def fails_once(theirs: Connection, log: Path, environment: dict[str, str]) -> None:
    theirs.recv()
    theirs.send("Traceback: no such data set")
    assert theirs.recv() == ["--again"]
    theirs.send(None)
    theirs.recv()


def dies(theirs: Connection, log: Path, environment: dict[str, str]) -> None:
    theirs.recv()


def hangs(theirs: Connection, log: Path, environment: dict[str, str]) -> None:
    time.sleep(600)
