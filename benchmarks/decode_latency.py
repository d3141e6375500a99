"""Time of a decode step: dense and with SPARSEMM, each with caches of the model's type and of fp8.

    python benchmarks/decode_latency.py                             # small form, on the CPU
    python benchmarks/decode_latency.py --model llava-next-vicuna-7b
    python benchmarks/decode_latency.py --variants dense,sparsemm   # two engines instead of five

Each cell is a prompt length and a batch. Its prompts are asked of dense vLLM, of SPARSEMM with each
budget (both with a bf16 and an fp8 cache), and of SPARSEMM with even budgets (SnapKV's), `--rounds`
times; the median counts. As many engines as the device has memory for are open side by side and
asked in turn; the others follow. Pools of a kind have equal bytes, so that fp8 holds more tokens.

Beside each figure stand the floor, which is the bytes of the weights and of the kept KV over the
bandwidth that copying reaches on this device, and the KV bytes that requests hold in vLLM's block
pool, with what the kept tokens alone would take. A dense cache that exceeds its pool is not asked,
and the bytes that it lacks are printed; where none fits, nothing is.

Results are written after each cell; what is there is not measured again. After `--pieces-of`
seconds the run ends behind a cell with status 3, so that a long one can be done in pieces. Needs
vLLM only.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from operator import methodcaller
from statistics import median
from typing import Any, Self

from speed.command import Cells, finish, make_parser, measure_groups, prepare
from speed.engines import Engine, Timing, engine_options, random_prompts
from speed.results import Deadline, Results
from speed.subject import GIB, Subject, copy_bandwidth, device_memory
from speed.variants import (
    BLOCK_SIZE,
    DENSE,
    VARIANTS,
    Variant,
    add_option,
    by_size,
    in_own_process,
    ratios,
    served_here,
    shown,
    split,
)

from sparsemm_vllm.environment import has_gpu

BESIDE = 5.0  # GiB that an engine takes beside the counted weights and the pool: a guess, on top
USABLE = 0.95  # share of the device's memory
NO_DENSE = "no dense cache of this size fits its pool"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        lengths: lengths of prompts, in tokens.
        batches: requests at once.
        budgets: tokens per KV head.
        tokens: tokens of an answer.
        rounds: times that each cell is asked.
        dense_gib, pruned_gib: GiB of the pools of dense and of pruned blocks, fp8 or not.
        variants: names of what is compared.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    batches: tuple[int, ...] = (1, 8, 16, 32)
    budgets: tuple[int, ...] = (256, 1024)
    tokens: int = 64
    rounds: int = 3
    dense_gib: float = 68.0
    pruned_gib: float = 24.0
    variants: tuple[str, ...] = tuple(VARIANTS)

    def pool_gib(self, variant: Variant) -> float:
        """GiB of a variant's pool."""
        return self.pruned_gib if variant.method else self.dense_gib

    def fitted(self, memory: float | None, subject: Subject) -> Self:
        """The same with pools that an engine alone on the device has room for.

        Args:
            memory: bytes of the device; None: as many as it takes.
            subject: the model.
        """
        if memory is None:
            return self
        room = USABLE * memory / GIB - _beside_gib(subject)
        if room <= 0:
            raise SystemExit(f"{subject.name} does not fit {memory / GIB:.0f} GiB")
        pools = {name: min(getattr(self, name), room) for name in ("dense_gib", "pruned_gib")}
        return replace(self, **{name: round(gib, 3) for name, gib in pools.items()})

    def groups(self, memory: float | None, subject: Subject) -> list[list[Variant]]:
        """Variants whose engines are open at the same time, in their order.

        Each goes to the first group that has room for its weights and its pool.

        Args:
            memory: bytes of the device; None: as many as it takes.
            subject: the model.
        """
        found: list[list[Variant]] = []
        for variant in (VARIANTS[name] for name in self.variants):
            for group in found:
                pools = [self.pool_gib(each) + _beside_gib(subject) for each in (*group, variant)]
                if memory is None or sum(pools) <= USABLE * memory / GIB:
                    group.append(variant)
                    break
            else:
                found.append([variant])
        return found

    def lacks(self, subject: Subject, n: int, batch: int) -> dict[str, int]:
        """Bytes that pools of dense variants lack for a cell; fp8 may fit where bf16 does not.

        Args:
            subject: the model.
            n: length of a prompt, in tokens.
            batch: requests at once.
        """
        blocks, found = batch * -(-(n + self.tokens) // BLOCK_SIZE), {}
        for name in self.dense:
            block = BLOCK_SIZE * VARIANTS[name].token_bytes(subject)
            held = int(self.dense_gib * GIB) // block - 1  # one of vLLM's holds nothing
            if blocks > held:
                found[name] = (blocks - held) * block
        return found

    @property
    def dense(self) -> list[str]:
        """Names of the variants that are not pruned."""
        return [name for name in self.variants if name in DENSE]


SMALL = Plan((160, 640), (1, 4), (32, 64), tokens=12, dense_gib=0.01, pruned_gib=0.06)


def _beside_gib(subject: Subject) -> float:
    return subject.weight_bytes / GIB + BESIDE


class Rivals:
    """Engines that are open side by side and asked in turn.

    Args:
        subject: the model.
        variants: variants to compare.
        plan: lengths, batches, budgets and pools.
        options: options of `vllm.LLM`, for all of them.
        bandwidth: bytes that the device copies in a second.
    """

    def __init__(
        self,
        subject: Subject,
        variants: Sequence[Variant],
        plan: Plan,
        options: dict[str, Any],
        bandwidth: float,
    ) -> None:
        self.subject, self.plan, self.bandwidth = subject, plan, bandwidth
        self.engines: dict[str, Engine] = {}
        try:
            for variant in variants:
                self.engines[variant.name] = open_engine(subject, variant, plan, options)
        except BaseException:
            self.close()
            raise

    def measure(self, n: int, batch: int) -> dict[str, Any]:
        """A cell: of each variant its time, floor and bytes, or the bytes that it lacks."""
        lacks = self.plan.lacks(self.subject, n, batch)
        cell = {name: {"lacks_bytes": lacks[name]} for name in self.engines if name in lacks}
        if lacks and len(lacks) == len(self.plan.dense):
            return cell or {"skipped": NO_DENSE}
        asked = [VARIANTS[name] for name in self.engines if name not in lacks]
        timings: dict[str, list[Timing]]
        timings = {key: [] for variant in asked for key in budgets_of(variant, self.plan)}
        for _ in range(self.plan.rounds):
            for key, found in timings.items():
                found.append(self.ask(key, n, batch))
        return cell | {key: self.figures(key, n, batch, timings[key]) for key in timings}

    def ask(self, key: str, n: int, batch: int) -> Timing:
        """Prompts of `n` tokens at once; for all variants the same ones."""
        variant, budget = split(key)
        prompts = random_prompts(batch, n, self.subject.config.vocab_size, seed=n * 100 + batch)
        extra = None if budget is None else {"sparsemm_budget": budget}
        return self.engines[variant.name].ask(prompts, self.plan.tokens, extra)

    def figures(self, key: str, n: int, batch: int, timings: list[Timing]) -> dict[str, float]:
        """What a cell says of a variant."""
        (variant, budget), kept = split(key), float(n)
        if variant.method and budget is not None:
            kept = self.subject.layout(budget, variant.method).mean_kept(n)
        token_bytes = variant.token_bytes(self.subject)
        ideal = batch * (kept + self.plan.tokens / 2) * token_bytes
        floor = 1e3 * (self.subject.weight_bytes + ideal) / self.bandwidth
        steps = [timing.step_ms for timing in timings]
        return {
            "step_ms": round(median(steps), 4),
            "fastest_ms": round(min(steps), 4),
            "slowest_ms": round(max(steps), 4),
            "floor_ms": round(floor, 4),
            "kept_tokens": round(kept, 1),
            "kv_bytes": timings[-1].held_blocks * BLOCK_SIZE * token_bytes,
            "ideal_kv_bytes": round(ideal),
        }

    def close(self) -> None:
        """End their processes."""
        for engine in self.engines.values():
            engine.close()


def budgets_of(variant: Variant, plan: Plan) -> list[str]:
    """Keys of a variant's figures: its name, with each budget if it has one."""
    return [f"{variant.name}-{b}" for b in plan.budgets] if variant.method else [variant.name]


def open_engine(subject: Subject, variant: Variant, plan: Plan, options: dict[str, Any]) -> Engine:
    """An engine of a variant that has room for every cell of a plan."""
    budgets = {"budget": min(plan.budgets), "max_request_budget": max(plan.budgets)}
    options = {"max_num_seqs": max(plan.batches)} | options
    options["max_model_len"] = max(plan.lengths) + plan.tokens + 1
    gib = plan.pool_gib(variant)
    return Engine(engine_options(subject, variant, budgets, gib, **options))


def measure(
    subject: Subject,
    plan: Plan,
    results: Results,
    deadline: Deadline,
    options: dict[str, Any],
    memory: int | None,
) -> bool:
    """Measure the missing cells, a group of engines after the other; whether none is left."""
    sizes = list(product(plan.lengths, plan.batches))
    bandwidth = cache(lambda: in_own_process(copy_bandwidth))

    def group(variants: list[Variant]) -> tuple[Callable[[], closing[Rivals]], Cells]:
        names = "+".join(variant.name for variant in variants)
        cells: Cells = {
            f"n={n} batch={batch} {names}": methodcaller("measure", n, batch) for n, batch in sizes
        }
        return lambda: closing(Rivals(subject, variants, plan, options, bandwidth())), cells

    return measure_groups(results, map(group, plan.groups(memory, subject)), deadline)


def table(results: Results) -> str:
    """In the form of the published one: ms a token, full and pruned."""
    dense = "  ".join(f"x {name}" for name in DENSE)
    lines = [f"      n batch  variant                 ms  {dense}  x floor      MiB  x ideal"]
    for (n, batch), figures in by_size(results.cells).items():
        for variant, r in figures.items():
            start = f"{n:>7} {batch:>5}  {variant:18}"
            if (lacks := r.get("lacks_bytes")) is not None:
                lines.append(f"{start} KV cache needs {lacks / (1 << 20):,.1f} MiB more")
                continue
            times = zip(DENSE, ratios(figures, variant, "step_ms"), strict=True)
            lines.append(
                f"{start} {r['step_ms']:7.3f}  "
                + "  ".join(f"{shown(ratio):>{2 + len(name)}}" for name, ratio in times)
                + f" {r['step_ms'] / r['floor_ms']:8.2f} {r['kv_bytes'] / (1 << 20):8.1f} "
                f"{r['kv_bytes'] / r['ideal_kv_bytes']:8.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = make_parser(__doc__)
    add_option(parser, tuple(VARIANTS))
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt tokens")
    parser.add_argument("--batches", type=int, nargs="+", help="requests at once")
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens per KV head")
    parser.add_argument("--tokens", type=int, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, help="times that each cell is asked")
    parser.add_argument("--dense-gib", type=float, help="pool of a dense engine")
    parser.add_argument("--pruned-gib", type=float, help="pool of another")
    given = parser.parse_args()
    deadline = Deadline(given.pieces_of)
    subject, options = prepare(given.model, given.models, given.no_inductor)
    given.variants, skipped = served_here(given.variants, subject.head_size, options["dtype"])
    changes = {field.name: getattr(given, field.name) for field in fields(Plan)}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items() if v}
    plan = replace(Plan() if has_gpu() else SMALL, **changes)
    memory = in_own_process(device_memory)
    plan = plan.fitted(memory, subject)
    asked = {"model": subject.name, "budgets": plan.budgets, "tokens": plan.tokens}
    asked |= {"rounds": plan.rounds, "options": options}
    asked |= {"dense_gib": plan.dense_gib, "pruned_gib": plan.pruned_gib}
    results = Results.of(f"decode-latency-{subject.name}", asked, not has_gpu(), given.out)
    results.skipped.update(skipped)
    done = measure(subject, plan, results, deadline, options, memory)
    finish(results, table(results), done)


if __name__ == "__main__":
    main()
