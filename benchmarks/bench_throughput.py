"""Throughput under pytest-benchmark: ``pytest benchmarks --benchmark-only --benchmark-json FILE``.

The bundled model on the CPU, a 7B model with random weights on a GPU. The whole matrix is measured
by the scripts beside this file.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

import serving
from decode_latency import PROFILED, SMALL, Pair, Plan
from speed.command import prepare
from speed.engines import random_prompts
from speed.plans import plans_for
from speed.results import Deadline, Results

from sparsemm_vllm.environment import has_gpu

MODEL = "llava-next-vicuna-7b" if has_gpu() else None
PLAN = replace(Plan(), lengths=(8192,), batches=(8,)) if has_gpu() else SMALL
ROUNDS = 3


@pytest.fixture(scope="module")
def subject() -> Any:
    return prepare(MODEL)


@pytest.fixture(scope="module")
def pair(subject: Any) -> Iterator[Pair]:
    opened = Pair(subject[0], PROFILED, PLAN, subject[1])
    yield opened
    opened.close()


@pytest.mark.parametrize("variant", ["dense", *(f"{PROFILED}-{b}" for b in PLAN.budgets)])
def bench_decode(benchmark: Any, pair: Pair, variant: str) -> None:
    """Prompts at once, from the first of them to the last token of all."""
    n, batch = max(PLAN.lengths), PLAN.batches[0]
    timings = []
    benchmark.pedantic(
        lambda: timings.append(pair.ask(variant, n, batch)), rounds=ROUNDS, warmup_rounds=1
    )
    figures = pair.figures(variant, n, batch, timings)
    tokens = batch * PLAN.tokens / benchmark.stats["mean"]
    benchmark.extra_info.update(figures, n=n, batch=batch, tokens_per_second=round(tokens, 2))
    assert figures["kv_bytes"] >= batch * figures["kept_tokens"] * pair.subject.token_bytes
    assert (figures["kept_tokens"] < n) == (variant != "dense")


@pytest.mark.parametrize("asked", [{"sparsemm": 0}, {}], ids=["dense", "pruned"])
def bench_prefill(benchmark: Any, pair: Pair, asked: dict[str, int]) -> None:
    """To the first token, of prompts that were never asked."""
    n, seeds = max(PLAN.lengths), count(100 * len(asked))  # the two ask nothing alike
    vocabulary = pair.subject.config.vocab_size

    def prompt() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (random_prompts(1, n, vocabulary, next(seeds)), 1, asked), {}

    benchmark.pedantic(pair.pruned.ask, setup=prompt, rounds=ROUNDS)
    benchmark.extra_info.update(n=n)


def bench_serving(benchmark: Any, tmp_path: Path) -> None:
    """Two servers in turn, started included; what they did is in the extra information."""
    plans = plans_for(cpu=not has_gpu(), quick=True)
    results = Results(tmp_path / "serving.json", {}, cpu=not has_gpu())
    left = benchmark.pedantic(
        serving.measure, args=(plans, results, Deadline(1800), tmp_path), rounds=1
    )
    assert not left
    benchmark.extra_info.update(results.cells)
