"""Profile a model with `forced` and with `free` answers in one engine: what each costs and finds.

    python benchmarks/compare_modes.py                     # the bundled model, 400 samples
    python benchmarks/compare_modes.py MODEL --samples 50

CPU time is that of this process, in which the engine runs. The first batch of each mode warms up
what it needs and counts, as it does for who measures a profile.
"""

import json
import os
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.commands.evaluate.run import OFFLINE_ENGINE
from sparsemm_vllm.data import load_samples
from sparsemm_vllm.environment import quieten_vllm
from sparsemm_vllm.profiler.engine import check_model, open_engine, prepare_process
from sparsemm_vllm.profiler.partial import Run
from sparsemm_vllm.profiler.reliability import spearman
from sparsemm_vllm.reader import READER, reader_folder

TOP = (2, 5, 10)  # heads
MODES = ("forced", "free")


def best(scores: np.ndarray, heads: int) -> set[int]:
    """The heads with the largest scores."""
    return set(np.argsort(-scores.ravel(), kind="stable")[:heads].tolist())


def main(
    model: Annotated[str, typer.Argument(help="Name or folder.")] = READER,
    samples: Annotated[int, typer.Option(help="To measure with.")] = 400,
    max_num_seqs: Annotated[int, typer.Option(help="Answers at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
) -> None:
    """Compare the modes and print a table and a line of JSON."""
    prepare_process()
    quieten_vllm()
    os.environ.update(OFFLINE_ENGINE)
    from sparsemm_vllm.profiler.run import ROWS, profile_engine

    folder = str(reader_folder()) if model == READER else model
    chosen = load_samples("ocr", samples, seed)
    config = check_model(folder, {})
    llm = open_engine(folder, config, ROWS, {"max_num_seqs": max_num_seqs})
    found: dict[str, dict[str, float | int | None]] = {}
    scores = {}
    for mode in MODES:
        wall, cpu = time.monotonic(), time.process_time()
        run = Run(model, config_hash(config), mode, chosen.name, chosen.hash, samples, seed)
        profile = profile_engine(llm, chosen, run)
        scores[mode] = np.array(profile.scores)
        found[mode] = {
            "cpu_s": round(time.process_time() - cpu, 1),
            "wall_s": round(time.monotonic() - wall, 1),
            "answer_tokens": int(profile.provenance["tokens"]),
            "split_half": profile.split_half and round(profile.split_half, 4),
        }
    forced, free = (scores[mode] for mode in MODES)
    correlation = spearman(forced, free)
    overlap = {k: len(best(forced, k) & best(free, k)) / k for k in TOP}

    table = Table("mode", *found["forced"], title=f"{model}, {samples} samples")
    for mode, figures in found.items():
        table.add_row(mode, *map(str, figures.values()))
    console = Console()
    console.print(table)
    console.print(
        f"Spearman {correlation:.4f}; of the best {', '.join(map(str, TOP))} heads are the same: "
        + ", ".join(f"{share:.0%}" for share in overlap.values())
    )
    document = found | {"spearman": correlation, "same_of_the_best": overlap}
    console.print(json.dumps(document), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
