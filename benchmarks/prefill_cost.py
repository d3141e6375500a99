"""What pruning costs a prefill: time to the first token with it and without, in one engine.

    python benchmarks/prefill_cost.py                             # small form, on the CPU
    python benchmarks/prefill_cost.py --model llava-next-vicuna-7b

Requests alone in the engine ask by turns to be pruned and to stay dense (`vllm_xargs`), each with a
prompt that was never asked, without prefix caching. The share is the median of the pairs'
differences over the median dense time. Resumable in pieces, as decode_latency.py. Needs vLLM only.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parent))

from speed.command import finish, make_parser, measure_cells, prepare
from speed.engines import Engine, random_prompts
from speed.results import Deadline, Results
from speed.subject import GIB, Subject

from sparsemm_vllm.environment import has_gpu

LENGTHS, SMALL_LENGTHS = (2048, 4096, 8192, 16384, 32768), (160, 320, 640)
BUDGET, SMALL_BUDGET = 256, 64
ROUNDS = 7
POOL_GIB, SMALL_POOL_GIB = 24.0, 0.06


def open_engine(subject: Subject, lengths: tuple[int, ...], options: dict[str, Any]) -> Engine:
    """One of SPARSEMM."""
    budget, gib = (BUDGET, POOL_GIB) if has_gpu() else (SMALL_BUDGET, SMALL_POOL_GIB)
    return Engine(
        str(subject.folder),
        "SPARSEMM",
        {"profile": subject.profile, "budget": budget, "window": subject.window},
        kv_cache_memory_bytes=round(gib * GIB),
        max_model_len=max(lengths) + 2,
        max_num_seqs=4,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0},
        **options,
    )


def measure(engine: Engine, vocabulary: int, n: int, rounds: int) -> dict[str, Any]:
    """A cell: seconds to the first token, and what of it is the prune's."""
    times: dict[str, list[float]] = {"dense": [], "pruned": []}
    asked = {"dense": {"sparsemm": 0}, "pruned": {}}
    for i in range(-1, rounds):  # the first round warms up
        for j, (name, extra_args) in enumerate(asked.items()):
            prompts = random_prompts(1, n, vocabulary, seed=10 * (1000 * n + i + 1) + j)
            seconds = engine.ask(prompts, 1, extra_args).first_token_s
            if i >= 0:
                times[name].append(seconds)
    dense, pruned = median(times["dense"]), median(times["pruned"])
    differences = [b - a for a, b in zip(times["dense"], times["pruned"], strict=True)]
    return {
        "dense_s": round(dense, 5),
        "pruned_s": round(pruned, 5),
        "prune_share": round(median(differences) / dense, 4),
        "shares": [round(difference / dense, 4) for difference in differences],
    }


def table(results: Results) -> str:
    """A line for each length."""
    lines = ["      n    dense s   pruned s   prune"]
    for name, r in results.cells.items():
        lines.append(
            f"{name.removeprefix('n='):>7} {r['dense_s']:10.4f} {r['pruned_s']:10.4f} "
            f"{r['prune_share']:7.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of each length")
    given = parser.parse_args()
    deadline = Deadline(given.pieces_of)
    subject, options = prepare(given.model, given.models, given.no_inductor)
    lengths = tuple(given.lengths or (LENGTHS if has_gpu() else SMALL_LENGTHS))
    asked = {"model": subject.name, "rounds": given.rounds, "options": options}
    results = Results.of(f"prefill-cost-{subject.name}", asked, not has_gpu(), given.out)
    done = {f"n={n}" for n in lengths} <= results.cells.keys()
    if not done:
        engine = open_engine(subject, lengths, options)
        vocabulary = subject.config.vocab_size
        cells = {f"n={n}": partial(measure, engine, vocabulary, n, given.rounds) for n in lengths}
        done = measure_cells(results, cells, deadline)
        engine.close()
    finish(results, table(results), done)


if __name__ == "__main__":
    main()
