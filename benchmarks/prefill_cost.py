"""Time to the first token: dense and pruned, each with caches of the model's type and of fp8.

    python benchmarks/prefill_cost.py                             # small form, on the CPU
    python benchmarks/prefill_cost.py --model llava-next-vicuna-7b

Each variant has the device for itself, one after the other. Requests are alone in the engine, each
with a prompt that was never asked, without prefix caching. An engine of SPARSEMM is asked by turns
to prune and to leave the prompt whole (`vllm_xargs`): what the prune costs is the median of the
neighbours' differences, as a share of the median time without it. Resumable in pieces, as
decode_latency.py. Needs vLLM only.
"""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from statistics import median
from typing import Any

from common import aligned
from speed.command import Cells, finish, make_parser, measure_groups, prepare
from speed.engines import Engine, engine_options, random_prompts
from speed.results import Deadline, Results
from speed.subject import Subject
from speed.variants import DENSE, VARIANTS, Variant, add_option, ratios, served_here, shown

from sparsemm_vllm.environment import has_gpu

LENGTHS, SMALL_LENGTHS = (2048, 4096, 8192, 16384, 32768), (160, 320, 640)
BUDGET, SMALL_BUDGET = 256, 64
ROUNDS = 7
POOL_GIB, SMALL_POOL_GIB = 24.0, 0.06


def open_engine(
    subject: Subject, variant: Variant, lengths: tuple[int, ...], options: dict[str, Any]
) -> Engine:
    """An engine of a variant."""
    budget, gib = (BUDGET, POOL_GIB) if has_gpu() else (SMALL_BUDGET, SMALL_POOL_GIB)
    options = {"enable_prefix_caching": False, "max_num_seqs": 4} | options
    options["max_model_len"] = max(lengths) + 2
    return Engine(engine_options(subject, variant, {"budget": budget}, gib, **options))


def measure(
    engine: Engine, variant: Variant, vocabulary: int, n: int, rounds: int
) -> dict[str, Any]:
    """A cell: seconds to the first token, and what of it is the prune's."""
    asked: dict[str, Any] = {"whole": None}
    if variant.method:
        asked = {"whole": {"sparsemm": 0}, "pruned": {}}
    times: dict[str, list[float]] = {name: [] for name in asked}
    for i in range(-1, rounds):  # the first round warms up
        for j, (name, extra_args) in enumerate(asked.items()):
            prompts = random_prompts(1, n, vocabulary, seed=10 * (1000 * n + i + 1) + j)
            seconds = engine.ask(prompts, 1, extra_args).first_token_s
            if i >= 0:
                times[name].append(seconds)
    own = times["pruned" if variant.method else "whole"]
    names = "first_token_s", "fastest_s", "slowest_s"
    cell: dict[str, Any] = {
        name: round(seconds, 5)
        for name, seconds in zip(names, (median(own), min(own), max(own)), strict=True)
    }
    if not variant.method:
        return cell
    whole = median(times["whole"])
    differences = [b - a for a, b in zip(times["whole"], own, strict=True)]
    return cell | {
        "whole_s": round(whole, 5),
        "prune_share": round(median(differences) / whole, 4),
        "shares": [round(difference / whole, 4) for difference in differences],
    }


def measure_all(
    subject: Subject,
    names: list[str],
    lengths: tuple[int, ...],
    rounds: int,
    results: Results,
    deadline: Deadline,
    options: dict[str, Any],
) -> bool:
    """Measure the missing cells, one engine after the other; whether none is left."""

    def group(variant: Variant) -> tuple[Callable[[], closing[Engine]], Cells]:
        asked = {"variant": variant, "vocabulary": subject.config.vocab_size, "rounds": rounds}
        cells: Cells = {f"n={n} {variant.name}": partial(measure, n=n, **asked) for n in lengths}
        return lambda: closing(open_engine(subject, variant, lengths, options)), cells

    return measure_groups(results, map(group, (VARIANTS[name] for name in names)), deadline)


def table(results: Results) -> str:
    """A line for each length and variant."""
    by_length: dict[int, dict[str, Any]] = {}
    for name, cell in results.cells.items():
        length, variant = name.removeprefix("n=").split()
        by_length.setdefault(int(length), {})[variant] = cell
    lines = [["n", "variant", "first token s", *(f"x {name}" for name in DENSE), "prune"]]
    for n, cells in sorted(by_length.items()):
        for variant, r in cells.items():
            times = map(shown, ratios(cells, variant, "first_token_s"))
            share = f"{r['prune_share']:.1%}" if "prune_share" in r else ""
            lines.append([str(n), variant, f"{r['first_token_s']:.4f}", *times, share])
    return aligned(lines, str.rjust, str.rjust)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = make_parser(__doc__)
    add_option(parser)
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="requests of each kind")
    given = parser.parse_args()
    deadline = Deadline(given.pieces_of)
    subject, options = prepare(given.model, given.models, given.no_inductor)
    names, skipped = served_here(given.variants, subject.head_size, options["dtype"])
    lengths = tuple(given.lengths or (LENGTHS if has_gpu() else SMALL_LENGTHS))
    asked = {"model": subject.name, "rounds": given.rounds, "options": options}
    results = Results.of(f"prefill-cost-{subject.name}", asked, not has_gpu(), given.out)
    results.skipped.update(skipped)
    done = measure_all(subject, names, lengths, given.rounds, results, deadline, options)
    finish(results, table(results), done)


if __name__ == "__main__":
    main()
