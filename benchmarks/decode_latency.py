"""Time of a decode step, dense and with SPARSEMM, engines side by side and asked in turn.

    python benchmarks/decode_latency.py                             # small form, on the CPU
    python benchmarks/decode_latency.py --model llava-next-vicuna-7b

Each cell is a prompt length and a batch. Its prompts are asked of dense vLLM, of SPARSEMM with each
budget, and of SPARSEMM with even budgets (SnapKV's), `--rounds` times in turn; the median counts.
Beside each figure stand the floor, which is the bytes of the weights and of the kept KV over the
bandwidth that copying reaches on this device, and the KV bytes that requests hold in vLLM's block
pool, with what the kept tokens alone would take. A cell whose dense cache exceeds the pool is
skipped, and the bytes that it lacks are printed.

Results are written after each cell; what is there is not measured again. After `--pieces-of`
seconds the run ends behind a cell with status 3, so that a long one can be done in pieces. Needs
vLLM only.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parent))

from speed.command import finish, make_parser, measure_cells, prepare
from speed.engines import BLOCK_SIZE, Engine, Timing, dense_backend, random_prompts
from speed.results import Deadline, Results
from speed.subject import GIB, Subject, copy_bandwidth

from sparsemm_vllm.environment import has_gpu

PROFILED, EVEN = "sparsemm", "snapkv"  # methods of the settings


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        lengths: of prompts, in tokens.
        batches: requests at once.
        budgets: tokens per KV head.
        tokens: of an answer.
        rounds: times that each cell is asked.
        dense_gib, pruned_gib: of the pools of dense and of pruned blocks.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    batches: tuple[int, ...] = (1, 8, 16, 32)
    budgets: tuple[int, ...] = (256, 1024)
    tokens: int = 64
    rounds: int = 3
    dense_gib: float = 68.0
    pruned_gib: float = 24.0


SMALL = Plan((160, 640), (1, 4), (32, 64), tokens=12, dense_gib=0.01, pruned_gib=0.06)


class Pair:
    """Two engines: dense, and with a method.

    Args:
        subject: the model.
        method: `PROFILED` or `EVEN`.
        plan: what is measured.
        options: of `vllm.LLM`, for both.
    """

    def __init__(self, subject: Subject, method: str, plan: Plan, options: dict[str, Any]) -> None:
        self.subject, self.method, self.plan = subject, method, plan
        self.bandwidth = _in_own_process(copy_bandwidth)
        common = {
            "max_model_len": max(plan.lengths) + plan.tokens + 1,
            "max_num_seqs": max(plan.batches),
            "limit_mm_per_prompt": {"image": 0},
        } | options
        settings = {
            "profile": subject.profile,
            "method": method,
            "budget": min(plan.budgets),
            "max_request_budget": max(plan.budgets),
            "window": subject.window,
        }
        self.dense = _engine(subject, dense_backend(), None, plan.dense_gib, common)
        self.pruned = _engine(subject, "SPARSEMM", settings, plan.pruned_gib, common)

    def measure(self, n: int, batch: int) -> dict[str, Any]:
        """A cell: of each variant its time, floor and bytes."""
        blocks = batch * -(-(n + self.plan.tokens) // BLOCK_SIZE)
        if (missing := blocks - self.dense.blocks) > 0:
            return {"dense_lacks_bytes": missing * self._block_bytes}
        timings: dict[str, list[Timing]] = {variant: [] for variant in self.variants}
        for _ in range(self.plan.rounds):
            for variant, found in timings.items():
                found.append(self.ask(variant, n, batch))
        return {variant: self.figures(variant, n, batch, timings[variant]) for variant in timings}

    @property
    def variants(self) -> list[str]:
        """``dense``, and the method with each budget."""
        return ["dense", *(f"{self.method}-{budget}" for budget in self.plan.budgets)]

    def ask(self, variant: str, n: int, batch: int) -> Timing:
        """Prompts of `n` tokens at once; for all variants the same ones."""
        prompts = random_prompts(batch, n, self.subject.config.vocab_size, seed=n * 100 + batch)
        if variant == "dense":
            return self.dense.ask(prompts, self.plan.tokens)
        return self.pruned.ask(prompts, self.plan.tokens, {"sparsemm_budget": _budget(variant)})

    def figures(self, variant: str, n: int, batch: int, timings: list[Timing]) -> dict[str, float]:
        """What a cell says of a variant."""
        kept = float(n)
        if variant != "dense":
            kept = self.subject.layout(_budget(variant), self.method).mean_kept(n)
        ideal = batch * (kept + self.plan.tokens / 2) * self.subject.token_bytes
        floor = 1e3 * (self.subject.weight_bytes + ideal) / self.bandwidth
        steps = [timing.step_ms for timing in timings]
        return {
            "step_ms": round(median(steps), 4),
            "fastest_ms": round(min(steps), 4),
            "slowest_ms": round(max(steps), 4),
            "floor_ms": round(floor, 4),
            "kept_tokens": round(kept, 1),
            "kv_bytes": timings[-1].held_blocks * self._block_bytes,
            "ideal_kv_bytes": round(ideal),
        }

    @property
    def _block_bytes(self) -> int:
        return BLOCK_SIZE * self.subject.token_bytes

    def close(self) -> None:
        """End their processes."""
        self.dense.close()
        self.pruned.close()


def _budget(variant: str) -> int:
    return int(variant.rpartition("-")[2])


def _engine(
    subject: Subject, backend: str, settings: Any, gib: float, options: dict[str, Any]
) -> Engine:
    pool = {"kv_cache_memory_bytes": round(gib * GIB)}
    return Engine(str(subject.folder), backend, settings, **(options | pool))


def _in_own_process(function: Any) -> Any:
    """What it returns; the memory it took on the device is free again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def measure(
    subject: Subject, plan: Plan, results: Results, deadline: Deadline, options: dict[str, Any]
) -> bool:
    """Measure the missing cells; whether none is left."""
    for method in (PROFILED, EVEN):
        sizes = list(product(plan.lengths, plan.batches))
        names = [f"{method} n={n} batch={batch}" for n, batch in sizes]
        if set(names) <= results.cells.keys():
            continue
        if deadline.left <= 0:
            return False
        pair = Pair(subject, method, plan, options)
        try:
            cells = [partial(pair.measure, n, batch) for n, batch in sizes]
            by_name = dict(zip(names, cells, strict=True))
            if not measure_cells(results, by_name, deadline):
                return False
        finally:
            pair.close()
    return True


def table(results: Results) -> str:
    """In the form of the published one: ms a token, full and pruned."""
    columns = "      n batch  variant              ms  x dense  x floor      MiB  x ideal"
    lines = [columns]
    for name, cell in results.cells.items():
        method, n, batch = (part.rpartition("=")[2] for part in name.split())
        start = f"{n:>7} {batch:>5}  "
        if (lacks := cell.get("dense_lacks_bytes")) is not None:
            lines.append(f"{start}{method:14} dense KV needs {lacks / (1 << 20):,.1f} MiB more")
            continue
        for variant, r in cell.items():
            if variant == "commit":
                continue
            lines.append(
                f"{start}{variant:14} {r['step_ms']:8.3f} "
                f"{cell['dense']['step_ms'] / r['step_ms']:8.2f} "
                f"{r['step_ms'] / r['floor_ms']:8.2f} {r['kv_bytes'] / (1 << 20):8.1f} "
                f"{r['kv_bytes'] / r['ideal_kv_bytes']:8.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt tokens")
    parser.add_argument("--batches", type=int, nargs="+", help="requests at once")
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens per KV head")
    parser.add_argument("--tokens", type=int, help="of an answer")
    parser.add_argument("--rounds", type=int, help="times that each cell is asked")
    parser.add_argument("--dense-gib", type=float, help="pool of the dense engine")
    parser.add_argument("--pruned-gib", type=float, help="pool of the other")
    given = parser.parse_args()
    deadline = Deadline(given.pieces_of)
    subject, options = prepare(given.model, given.models, given.no_inductor)
    changes = {field.name: getattr(given, field.name) for field in fields(Plan)}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items() if v}
    plan = replace(Plan() if has_gpu() else SMALL, **changes)
    asked = {"model": subject.name, "budgets": plan.budgets, "tokens": plan.tokens}
    asked |= {"rounds": plan.rounds, "options": options}
    results = Results.of(f"decode-latency-{subject.name}", asked, not has_gpu(), given.out)
    done = measure(subject, plan, results, deadline, options)
    finish(results, table(results), done)


if __name__ == "__main__":
    main()
