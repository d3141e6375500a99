"""`GET /sparsemm`, a page about the running server, and `/sparsemm/stats.json`, what it shows.

vLLM loads an endpoint plugin only if `VLLM_PLUGINS` names it. Like `/metrics`, it asks for no API
key; it never shows what was asked or answered.
"""

import time
from argparse import Namespace
from collections import defaultdict
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from starlette.datastructures import State
from vllm.v1.metrics.prometheus import get_prometheus_registry

from sparsemm_vllm.budget.plan import tokens_per_head
from sparsemm_vllm.engine.config import Serving, uses_sparsemm
from sparsemm_vllm.engine.frontend.metrics import PREFIX, SparseMMStatLogger, config_labels
from sparsemm_vllm.engine.scheduler.stats import REMEMBERED
from sparsemm_vllm.environment import metrics_folder

NO_STORE = {"Cache-Control": "no-store"}
HEADERS = NO_STORE | {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:",
    "Referrer-Policy": "no-referrer",
}


class SparseMMPage:
    """An endpoint plugin, as vLLM defines them."""

    name = "sparsemm_page"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add both routes."""
        html = resources.files(__package__).joinpath("page.html").read_text("utf-8")

        # No coroutines: reading the metrics of several API servers must not hold up requests.
        @app.get("/sparsemm", include_in_schema=False)
        def page(request: Request) -> HTMLResponse:
            _stats_of(request)
            return HTMLResponse(html, headers=HEADERS)

        @app.get("/sparsemm/stats.json", include_in_schema=False)
        def stats(request: Request) -> Any:
            return _stats_of(request).now()

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Find where this API server counts, if it serves with SPARSEMM and counts at all."""
        manager = getattr(engine_client, "logger_manager", None)
        loggers = manager.stat_loggers if manager else ()
        found = next((one for one in loggers if isinstance(one, SparseMMStatLogger)), None)
        state.sparsemm_stats = found and PageStats(found)


def _stats_of(request: Request) -> "PageStats":
    stats = request.app.state.sparsemm_stats
    if stats is None:
        reason = "This server does not use SPARSEMM, or was started with --disable-log-stats."
        raise HTTPException(404, reason)
    return stats


class PageStats:
    """What the page shows.

    Args:
        logger: this API server's.
    """

    def __init__(self, logger: SparseMMStatLogger) -> None:
        self._logger = logger
        config = logger.vllm_config
        assert uses_sparsemm(config)
        logger.share_recent(metrics_folder())
        layout = Serving.of(config).layout
        self._fixed = {
            "model": config.model_config.served_model_name,
            "settings": config_labels(config),
            "budgets": tokens_per_head(layout, config.model_config.max_model_len).tolist(),
        }

    def now(self) -> dict[str, Any]:
        """All engines together, as `/metrics` has them, and the last requests.

        Returns:
            `budgets` are the tokens that each KV head keeps of the longest prompt, ``[L][Hkv]``.
        """
        totals: dict[str, float] = defaultdict(float)
        by_outcome: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for metric in get_prometheus_registry().collect():
            for sample in metric.samples:
                name = sample.name.removeprefix(PREFIX).removesuffix("_total")
                if not sample.name.startswith(PREFIX):
                    continue
                totals[name] += sample.value
                if "outcome" in sample.labels:
                    by_outcome[name][sample.labels["outcome"]] += sample.value
        recent = [record for records in self._logger.recent().values() for record in records]
        recent.sort(key=lambda record: record["completed"], reverse=True)
        return {
            **self._fixed,
            "time": time.time(),
            "blocks": {
                name: totals[f"{name}_blocks"] for name in ("pool", "free", "held", "dense")
            },
            "freed_blocks": totals["freed_blocks"],
            "prune_seconds": totals["prune_seconds"],
            **{name: by_outcome[name] for name in ("requests", "prompt_tokens", "kept_tokens")},
            "recent": recent[:REMEMBERED],
        }
