"""SPARSEMM's numbers on vLLM's `/metrics`: from the engine to the API server, and there.

The scheduler runs in the engine's process; Prometheus asks the API server's. With each step vLLM
sends a `SchedulerStats` to one API server. Ours ride in the one field of it whose contents are
free, and are taken out before anyone else looks. So they arrive from every engine that vLLM's
numbers arrive from: spawned, data parallel, on another machine.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from pydantic import TypeAdapter, ValidationError
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.engine.scheduler.stats import Outcome, RequestRecord
from sparsemm_vllm.files import write_whole
from sparsemm_vllm.names import OTHERS, OURS

logger = init_logger("vllm.sparsemm.metrics")

PREFIX = "sparsemm:"
RECENT = "sparsemm-recent-"  # file name of what API servers tell each other, in vLLM's folder
RECENT_FILE = re.compile(rf"{RECENT}(\d+)-\d+\.json")  # engine, process


def take(scheduler_stats: Any) -> dict[str, Any] | None:
    """Take out what `send` put in; the statistics are as vLLM made them."""
    carrier = scheduler_stats and scheduler_stats.ec_connector_stats
    if not carrier or OURS not in carrier:
        return None
    scheduler_stats.ec_connector_stats = carrier[OTHERS]
    return carrier[OURS]


class SparseMMStatLogger(AggregateStatLoggerBase):
    """Prometheus metrics, each with vLLM's labels `model_name` and `engine`."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        for collector, names in list(REGISTRY._collector_to_names.items()):
            if any(name.startswith(PREFIX) for name in names):  # of an earlier engine
                REGISTRY.unregister(collector)
        self._recent: dict[int, dict[str, Any]] = {}
        self._shared: Path | None = None
        self.vllm_config = vllm_config
        model = vllm_config.model_config.served_model_name
        self._labels = {index: (model, str(index)) for index in engine_indexes}
        self._by_outcome = {
            "requests": _counter("requests", "Requests by what became of their prompt.", "outcome"),
            "prompt_tokens": _counter("prompt_tokens", "Tokens of their prompts.", "outcome"),
            "kept_tokens": _counter(
                "kept_tokens", "Prompt tokens that a KV head kept on average.", "outcome"
            ),
        }
        self._totals = {
            "freed_blocks": _counter(
                "freed_blocks", "Prompt blocks that pruned requests gave back to the pool."
            ),
            "invalid_requests": _counter(
                "invalid_requests",
                "Requests that no front end checked and that asked for what cannot be; they are "
                "served with the server's own settings.",
            ),
            "prune_seconds": _counter(
                "prune_seconds",
                "Time the worker's device spent on scoring, selecting and compacting; of the rank "
                "that answers.",
            ),
        }
        self._now = {
            "held_blocks": _gauge("held_blocks", "KV blocks that requests hold now."),
            "dense_blocks": _gauge(
                "dense_blocks", "KV blocks that the same requests would hold with dense attention."
            ),
            "free_blocks": _gauge("free_blocks", "KV blocks that are free, or cached only."),
            "pool_blocks": _gauge("pool_blocks", "KV blocks that there are."),
        }
        for labels in self._labels.values():
            for outcome in Outcome:
                for counter in self._by_outcome.values():
                    counter.labels(*labels, outcome)
            for metric in (*self._totals.values(), *self._now.values()):
                metric.labels(*labels)
        config = config_labels(vllm_config)
        info = _gauge("config_info", "Settings, as labels; always 1.", *config)
        for labels in self._labels.values():
            info.labels(*labels, *config.values()).set(1)

    @override
    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take our numbers out of the statistics and add them; vLLM's are left to its loggers."""
        ours = take(scheduler_stats)
        if ours is None:
            return
        labels = self._labels[engine_idx]
        for name, counter in self._by_outcome.items():
            for outcome, count in ours[name].items():
                counter.labels(*labels, outcome).inc(count)
        for name, total in self._totals.items():
            total.labels(*labels).inc(ours[name])
        for name, gauge in self._now.items():
            gauge.labels(*labels).set(ours[name])
        if "recent" in ours:
            self._recent[engine_idx] = ours["recent"]
            if self._shared is not None:
                self._write_recent(self._shared, engine_idx)

    def share_recent(self, folder: Path | None) -> None:
        """Share the last requests with the other API servers from now on, if there are any."""
        self._shared = folder

    def _write_recent(self, folder: Path, engine_idx: int) -> None:
        """Tell the others, if the folder takes it. vLLM calls this where it passes answers on."""
        file = folder / f"{RECENT}{engine_idx}-{os.getpid()}.json"
        try:
            write_whole(file, json.dumps(self._recent[engine_idx]), durable=False)
        except OSError as error:
            logger.warning_once(
                "SPARSEMM: the page of the other API servers lacks requests of this one: %s: %s",
                error.strerror, folder,
            )  # fmt: skip

    def recent(self) -> dict[int, list[dict[str, Any]]]:
        """The last requests of each engine, the latest first, as `RequestRecord` has them."""
        latest = dict(self._recent)
        for engine, told in _told_by_others(self._shared) if self._shared else ():
            if engine not in latest or told["time"] > latest[engine]["time"]:
                latest[engine] = told
        return {engine: told["requests"] for engine, told in latest.items()}

    @override
    def log_engine_initialized(self) -> None:
        """Nothing: the workers log at startup what is served."""


@dataclass(frozen=True)
class _Told:
    """What an API server writes of an engine."""

    time: float
    requests: list[RequestRecord]


_TOLD = TypeAdapter(_Told)


def _told_by_others(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The engines that API servers wrote of; a file that none of them wrote is passed over."""
    for file in folder.glob(f"{RECENT}*.json"):
        try:
            if name := RECENT_FILE.fullmatch(file.name):
                yield int(name[1]), asdict(_TOLD.validate_json(file.read_bytes()))
        except (OSError, ValidationError) as error:
            logger.warning_once("SPARSEMM: the page leaves out %s: %s", str(file), str(error))


def config_labels(vllm_config: VllmConfig) -> dict[str, str]:
    """The settings that an operator tells servers apart by."""
    settings = Serving.of(vllm_config).settings
    profile = settings.profile
    return {
        "method": settings.method,
        "budget": str(settings.budget),
        "window": str(settings.window),
        "profile": profile.model_id if isinstance(profile, HeadProfile) else profile,
    }


def _counter(name: str, documentation: str, *more_labels: str) -> Counter:
    return Counter(PREFIX + name, documentation, ["model_name", "engine", *more_labels])


def _gauge(name: str, documentation: str, *more_labels: str) -> Gauge:
    return Gauge(
        PREFIX + name,
        documentation,
        ["model_name", "engine", *more_labels],
        multiprocess_mode="mostrecent",  # an engine's numbers go now to one API server, now another
    )
