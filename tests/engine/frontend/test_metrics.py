"""Prometheus metrics: what the engine counts, and how it gets to the API server."""

import errno
import inspect
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics import loggers
from vllm.v1.metrics.stats import SchedulerStats

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.engine.frontend import metrics
from sparsemm_vllm.engine.frontend.metrics import SparseMMStatLogger, take
from sparsemm_vllm.engine.scheduler.stats import Outcome, RequestRecord
from support.engines import HELLO, WINDOW, Engine, ask, settings
from support.paths import ROOT
from support.tiny import make_llava

SHORT = {"prompt": "<s>hello"}


def sample(name: str, **labels: str) -> float:
    """The sum over all samples with these labels."""
    found = [
        s.value
        for metric in REGISTRY.collect()
        for s in metric.samples
        if s.name == f"sparsemm:{name}" and labels.items() <= s.labels.items()
    ]
    assert found, f"no sample of sparsemm:{name} with {labels}"
    return sum(found)


def test_what_is_carried_arrives_and_leaves_no_trace() -> None:
    for theirs in (None, {"their": "own"}):
        ours = {"requests": {"pruned": 1}, "recent": [{"finished": None}]}
        sent = SchedulerStats(
            num_running_reqs=3, ec_connector_stats={"sparsemm": ours, "other": theirs}
        )
        arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=SchedulerStats)
        assert take(arrived) == ours
        assert arrived == SchedulerStats(num_running_reqs=3, ec_connector_stats=theirs)
        assert take(arrived) is None
    assert take(None) is None


LAYOUT = CacheLayout(((3, 98), (0, 16)), window=8, base=16)
LIMITS = RequestLimits(8, 48)


def config() -> Any:
    model = SimpleNamespace(served_model_name="some model")
    served = SimpleNamespace(model_config=model, additional_config={})
    Serving(Settings(profile="none"), LAYOUT, LIMITS).remember(served)
    return served


def carried(**values: Any) -> SchedulerStats:
    nothing: dict[str, Any] = {
        "requests": {}, "prompt_tokens": {}, "kept_tokens": {}, "freed_blocks": 0,
        "invalid_requests": 0, "prune_seconds": 0.0, "held_blocks": 0, "dense_blocks": 0,
        "free_blocks": 0, "pool_blocks": 0,
    }  # fmt: skip
    return SchedulerStats(ec_connector_stats={"sparsemm": nothing | values, "other": None})


def test_engines_are_told_apart_and_counts_add_up() -> None:
    logger = SparseMMStatLogger(config(), [0, 1])
    assert sample("requests_total", outcome="opted_out", engine="1") == 0, "there from the start"
    for engine in (0, 1, 1):
        logger.record(carried(requests={"pruned": 2}, held_blocks=7), None, engine_idx=engine)
    assert sample("requests_total", engine="0", outcome="pruned") == 2
    assert sample("requests_total", engine="1", outcome="pruned") == 4
    assert sample("held_blocks", engine="1") == 7
    assert sample("config_info", method="sparsemm", budget="256", profile="none") == 2


def test_steps_without_our_numbers_change_nothing() -> None:
    logger = SparseMMStatLogger(config(), [0])
    logger.record(None, None)
    logger.record(SchedulerStats(), None)
    assert sample("requests_total") == 0


def test_the_last_requests_stay_until_others_arrive() -> None:
    logger = SparseMMStatLogger(config(), [0])
    logger.record(carried(recent={"time": 1.0, "requests": [{"request_id": "a"}]}), None)
    logger.record(carried(), None)
    assert logger.recent() == {0: [{"request_id": "a"}]}


def record_of(name: str) -> dict[str, Any]:
    return asdict(RequestRecord(name, Outcome.PRUNED, 100, 40.5, completed=1.0))


def test_api_servers_tell_each_other_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's numbers go to one of them only."""
    first, second = SparseMMStatLogger(config(), [0, 1]), SparseMMStatLogger(config(), [0, 1])
    for logger in (first, second):
        logger.share_recent(tmp_path)
    told = [
        (first, 0, 1.0, "a"), (second, 1, 2.0, "b"), (second, 0, 3.0, "c"), (first, 0, 2.5, "late")
    ]  # fmt: skip
    for logger, engine, at, name in told:
        monkeypatch.setattr("os.getpid", lambda logger=logger: id(logger))
        recent = {"time": at, "requests": [record_of(name)]}
        logger.record(carried(recent=recent), None, engine_idx=engine)
    assert first.recent() == second.recent() == {0: [record_of("c")], 1: [record_of("b")]}


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of, each as often as anyone would read it."""
    said: list[str] = []

    def warning_once(text: str, *args: Any) -> None:
        if (line := text % args) not in said:
            said.append(line)

    monkeypatch.setattr(metrics.logger, "warning_once", warning_once)
    return said


@pytest.mark.parametrize("broken", ["a full disk", "a folder that was removed"])
def test_what_cannot_be_shared_ends_no_api_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str], broken: str
) -> None:
    """vLLM calls `record` in the task that passes all answers on."""
    folder = tmp_path / "shared"
    folder.mkdir()
    logger = SparseMMStatLogger(config(), [0])
    logger.share_recent(folder)
    with monkeypatch.context() as patch:
        if broken == "a full disk":
            patch.setattr(os, "replace", no_space)
        else:
            folder.rmdir()
        for at in (1.0, 2.0):
            recent = {"time": at, "requests": [record_of(str(at))]}
            logger.record(carried(recent=recent, held_blocks=7), None)
    reason = "No space left" if broken == "a full disk" else "No such file"
    (line,) = warned
    assert reason in line
    assert str(folder) in line
    assert sample("held_blocks") == 7
    assert logger.recent() == {0: [record_of("2.0")]}
    assert not folder.exists() or not list(folder.iterdir()), "half of a file is left"


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "content",
    [
        b"", b'{"time": 3', b"\xff", b"[]", b'{"time": "now", "requests": []}',
        b'{"time": 3.0, "requests": [{"request_id": "of something else"}]}', None,
    ],
    ids=["empty", "half", "no text", "another shape", "another type", "no record", "a folder"],
)  # fmt: skip
def test_foreign_files_are_passed_over(
    tmp_path: Path, warned: list[str], content: bytes | None
) -> None:
    logger = SparseMMStatLogger(config(), [0])
    logger.share_recent(tmp_path)
    logger.record(carried(recent={"time": 1.0, "requests": [record_of("ours")]}), None)
    foreign = tmp_path / "sparsemm-recent-0-1.json"
    if content is None:
        foreign.mkdir()
    else:
        foreign.write_bytes(content)
    (tmp_path / "sparsemm-recent-mine.json").write_text("{}")
    for _ in range(2):
        assert logger.recent() == {0: [record_of("ours")]}
    (line,) = warned
    assert str(foreign) in line


def test_the_dashboard_shows_metrics_that_exist() -> None:
    SparseMMStatLogger(config(), [0])
    ours = {
        s.name
        for metric in REGISTRY.collect()
        for s in metric.samples
        if s.name.startswith("sparsemm:") and not s.name.endswith("_created")
    }
    text = (ROOT / "docs" / "grafana-dashboard.json").read_text()
    shown = set(re.findall(r"\b(?:sparsemm|vllm):\w+", text))
    assert {name for name in shown if name.startswith("sparsemm:")} == ours
    source = inspect.getsource(loggers)
    assert all(f'"{name}"' in source for name in shown - ours)
    labels = set(re.findall(r'(\w+)=~?\\"', text))
    assert labels == {"model_name", "engine", "outcome"}
    assert {label for s in REGISTRY.collect() for x in s.samples for label in x.labels} >= labels
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("metrics")
    kept = settings(40, folder / "kept")
    return Engine(make_llava(folder / "model"), kept, disable_log_stats=False)


@pytest.mark.engine
def test_an_engine_counts_what_it_does(engine: Engine) -> None:
    """Against the kept sets that the workers recorded and the blocks that the manager holds."""
    names = ("prompt_tokens_total", "kept_tokens_total", "requests_total")
    before = {name: sample(name, outcome="pruned") for name in names}
    short = sample("requests_total", outcome="too_short")
    freed, seconds = sample("freed_blocks_total"), sample("prune_seconds_total")
    seen = []

    def watch() -> None:
        tables = engine.manager.req_to_blocks
        held = sum(engine.held(request_id) for request_id in tables)
        assert sample("held_blocks") == held
        seen.append((held, sample("dense_blocks")))

    answers = engine.generate(ask(HELLO, 1), ask(HELLO, 2), SHORT, max_tokens=4, watch=watch)
    pruned = answers[:2]
    n = pruned[0].prompt_tokens
    assert sample("requests_total", outcome="pruned") - before["requests_total"] == 2
    assert sample("requests_total", outcome="too_short") - short == 1
    counted = sample("prompt_tokens_total", outcome="pruned") - before["prompt_tokens_total"]
    assert counted == sum(answer.prompt_tokens for answer in pruned)
    kept = [WINDOW + len(tokens) for answer in pruned for tokens in engine.kept(answer).values()]
    counted = sample("kept_tokens_total", outcome="pruned") - before["kept_tokens_total"]
    heads = len(kept) / len(pruned)
    assert counted * heads == pytest.approx(sum(kept))
    assert sample("freed_blocks_total") - freed == 2 * ((n - WINDOW) // 16)
    assert sample("prune_seconds_total") > seconds
    assert any(held < dense for held, dense in seen)
    assert seen[-1] == (0, 0)
    assert sample("free_blocks") == sample("pool_blocks") == engine.pool.num_gpu_blocks - 1


@pytest.mark.engine
def test_the_dense_equivalent_is_what_dense_holds(engine: Engine) -> None:
    seen = []
    (answer,) = engine.generate(
        ask(HELLO, 1), max_tokens=4, watch=lambda: seen.append(sample("dense_blocks"))
    )
    n = answer.prompt_tokens
    assert seen[-2] == -(-(n + 3) // 16), "all but the last token has its keys"


@pytest.mark.engine
def test_requests_with_settings_of_their_own(engine: Engine) -> None:
    def counted(outcome: str) -> list[float]:
        names = ("requests_total", "prompt_tokens_total", "kept_tokens_total")
        return [sample(name, outcome=outcome) for name in names]

    before = {outcome: counted(outcome) for outcome in ("opted_out", "pruned")}
    (answer,) = engine.generate(ask(HELLO, 6), max_tokens=2, extra_args={"sparsemm": 0})
    n = answer.prompt_tokens
    assert np.subtract(counted("opted_out"), before["opted_out"]).tolist() == [1, n, n]
    engine.generate(ask(HELLO, 6), max_tokens=2, extra_args={"sparsemm_budget": 24})
    kept = engine.layout.of_budget(24).mean_kept(n)
    assert kept < engine.layout.mean_kept(n)
    assert np.subtract(counted("pruned"), before["pruned"]) == pytest.approx([1, n, kept])


@pytest.mark.engine
def test_a_request_that_ends_with_its_prompt_counts(engine: Engine) -> None:
    before = sample("requests_total", outcome="pruned")
    engine.generate(ask(HELLO, 3), max_tokens=1)
    assert sample("requests_total", outcome="pruned") == before + 1


@pytest.mark.engine
def test_a_preempted_request_counts_once(engine: Engine) -> None:
    before = sample("requests_total", outcome="pruned")
    preempted = []

    def preempt() -> None:
        """All of them, once, when both are generating."""
        scheduler = engine.scheduler
        running = list(scheduler.running)
        if not preempted and len(running) == 2 and all(r.num_output_tokens for r in running):
            preempted.append(scheduler.reset_prefix_cache(reset_running_requests=True))

    engine.generate(ask(HELLO, 4), ask(HELLO, 5), max_tokens=6, watch=preempt)
    assert preempted
    assert sample("requests_total", outcome="pruned") == before + 2
    assert engine.all_free()
