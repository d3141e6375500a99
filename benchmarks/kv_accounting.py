"""KV bytes of requests, dense and pruned: exact on any machine, nothing is measured.

    python benchmarks/kv_accounting.py      # writes benchmarks/results/kv-accounting.json

For the models of benchmarks/models, with their synthetic head profiles, blocks are counted by the
functions that vLLM's scheduler counts with. Ideal is what the kept tokens would take without pages.
"""

from pathlib import Path
from typing import Any

from common import RESULTS, make_parser
from models import NAMES, prepare

from sparsemm_vllm.budget.plan import make_plan
from sparsemm_vllm.budget.profile import load_profile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.files import write_json

RESULT = RESULTS / "kv-accounting.json"
LENGTHS = (3072, 4096, 8192, 16384, 32768)
BUDGETS = (256, 1024)


def count(name: str, n: int, budget: int) -> dict[str, Any]:
    """A prompt of `n` tokens in bfloat16, in blocks of 16 tokens."""
    profile = load_profile(str(prepare(name) / "profile.json"))
    plan = make_plan(profile, Settings(budget=budget), n)
    return {
        "model": name,
        "prompt_tokens": n,
        "budget": budget,
        "dense_bytes": plan.dense_bytes,
        "held_bytes": plan.pruned_bytes,
        "ideal_bytes": plan.ideal_bytes,
        "times_less": round(plan.dense_bytes / plan.pruned_bytes, 2),
        "times_ideal": round(plan.pruned_bytes / plan.ideal_bytes, 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each model, length and budget."""
    lines = [f"{'model':24}      n budget  dense MB   held MB  less  x ideal"]
    lines += [
        f"{r['model']:24} {r['prompt_tokens']:6} {r['budget']:6} {r['dense_bytes'] / 1e6:9.0f} "
        f"{r['held_bytes'] / 1e6:9.1f} {r['times_less']:5.1f} {r['times_ideal']:8.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Count, print and write."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    given = parser.parse_args()
    rows = [count(name, n, budget) for name in NAMES for budget in BUDGETS for n in LENGTHS]
    print(table(rows))
    write_json(given.out, rows)


if __name__ == "__main__":
    main()
