"""Throughput under pytest-benchmark: ``pytest benchmarks --benchmark-only --benchmark-json FILE``.

The bundled model on the CPU, a 7B model with random weights on a GPU. The whole matrix is measured
by the scripts beside this file.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import serving
from decode_latency import SMALL, Plan, Rivals
from speed.command import prepare
from speed.engines import random_prompts
from speed.plans import plans_for
from speed.results import Deadline, Results
from speed.subject import copy_bandwidth
from speed.variants import VARIANTS, in_own_process

from sparsemm_vllm.environment import has_gpu

MODEL = "llava-next-vicuna-7b" if has_gpu() else None
PLAN = replace(Plan(), lengths=(8192,), batches=(8,)) if has_gpu() else SMALL
ROUNDS = 3
SERVERS = "dense", "sparsemm"  # the scripts know fp8 caches too


@pytest.fixture(scope="module")
def subject() -> Any:
    return prepare(MODEL)


@pytest.fixture(scope="module")
def rivals(subject: Any) -> Iterator[Rivals]:
    variants = [VARIANTS[name] for name in SERVERS]
    opened = Rivals(subject[0], variants, PLAN, subject[1], in_own_process(copy_bandwidth))
    yield opened
    opened.close()


@pytest.mark.parametrize("key", ["dense", *(f"sparsemm-{budget}" for budget in PLAN.budgets)])
def bench_decode(benchmark: Any, rivals: Rivals, key: str) -> None:
    """Prompts at once, from the first of them to the last token of all."""
    n, batch = max(PLAN.lengths), PLAN.batches[0]
    timings = []
    benchmark.pedantic(
        lambda: timings.append(rivals.ask(key, n, batch)), rounds=ROUNDS, warmup_rounds=1
    )
    figures = rivals.figures(key, n, batch, timings)
    tokens = batch * PLAN.tokens / benchmark.stats["mean"]
    benchmark.extra_info.update(figures, n=n, batch=batch, tokens_per_second=round(tokens, 2))
    assert figures["kv_bytes"] >= batch * figures["kept_tokens"] * rivals.subject.token_bytes
    assert (figures["kept_tokens"] < n) == (key != "dense")


@pytest.mark.parametrize("asked", [{"sparsemm": 0}, {}], ids=["dense", "pruned"])
def bench_prefill(benchmark: Any, rivals: Rivals, asked: dict[str, int]) -> None:
    """To the first token, of prompts that were never asked."""
    n, seeds = max(PLAN.lengths), count(100 * len(asked))  # the two ask nothing alike
    vocabulary = rivals.subject.config.vocab_size

    def prompt() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (random_prompts(1, n, vocabulary, next(seeds)), 1, asked), {}

    benchmark.pedantic(rivals.engines["sparsemm"].ask, setup=prompt, rounds=ROUNDS)
    benchmark.extra_info.update(n=n)


def bench_serving(benchmark: Any, tmp_path: Path) -> None:
    """Two servers in turn, started included; what they did is in the extra information."""
    plans = plans_for(cpu=not has_gpu(), quick=True)
    results = Results(tmp_path / "serving.json", {}, cpu=not has_gpu())
    left = benchmark.pedantic(
        serving.measure, args=(plans, results, Deadline(1800), tmp_path, (), SERVERS), rounds=1
    )
    assert not left
    benchmark.extra_info.update(results.cells)
