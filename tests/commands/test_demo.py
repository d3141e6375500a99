"""`sparsemm demo` as a user runs it: to its end, interrupted, and with a server that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

pytestmark = pytest.mark.engine

SPARSEMM = Path(sys.executable).parent / "sparsemm"
PATIENCE = 240  # seconds; the other test process may start engines too


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
    commands = {p.pid: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
    return [pid for pid, command in commands.items() if text in command and pid != os.getpid()]


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
