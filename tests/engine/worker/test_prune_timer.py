"""The device's time is read when the device has passed the events, never waited for."""

import time

import pytest
import torch

from sparsemm_vllm.engine.worker.prune_timer import PruneTimer


class Event:
    """A CUDA event of a device that the test drives."""

    now = 0.0
    passed = 0.0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        Event.now += 10
        self.time = Event.now

    def query(self) -> bool:
        return self.time <= Event.passed

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "this would wait for the device"
        return end.time - self.time


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = PruneTimer(torch.device("cuda"))
    for _ in range(2):
        with timer.measure():
            pass
    assert timer.take() == 0
    Event.passed = 20  # the first pair: 10 ms
    assert timer.take() == pytest.approx(0.01)
    assert timer.take() == 0
    with timer.measure():
        pass
    assert Event.made == 4, "events are used again"
    Event.passed = 60
    assert timer.take() == pytest.approx(0.02)


def test_on_the_cpu() -> None:
    timer = PruneTimer(torch.device("cpu"))
    with timer.measure():
        time.sleep(0.01)
    assert timer.take() >= 0.01
    assert timer.take() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_time() -> None:
    timer = PruneTimer(torch.device("cuda"))
    with timer.measure():
        torch.cuda._sleep(10_000_000)
    torch.cuda.synchronize()
    assert 0.001 < timer.take() < 1
