"""1,000 requests through vLLM's engine core and a pool that is always full: figures to compare.

    PYTHONPATH=tests python -m support.saturation
    PYTHONPATH=tests python -m support.saturation --requests 100

The traffic of the simulation without its faults, all of it waiting from the start. Nothing
is timed and nothing is random, so two commits can be compared.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import typer

from sparsemm_vllm import environment

SPARE = 60  # blocks beyond those of the largest request


def saturate(requests: int) -> dict[str, Any]:
    """What became of so many requests, with synchronous and with asynchronous scheduling.

    Returns:
        For each: `finished` requests, `preemptions`, `steps` that computed anything, and requests
        that ran in them, `mean_running` and `most_running`.
    """
    from support.simulation.engine import Simulation
    from support.simulation.scenario import Scenario

    kinds = {
        "synchronous": Scenario(spare=SPARE, faulty=0.0),
        "one step ahead": Scenario(spare=SPARE, faulty=0.0, asynchronous=True),
        "two steps ahead": Scenario(spare=SPARE, faulty=0.0, asynchronous=True, queue=3),
    }
    figures = {}
    for name, scenario in kinds.items():
        run = Simulation(0, scenario).run(calls=1_000 * requests, at_once=requests)
        figures[name] = {
            "finished": len(run.chats),
            "preemptions": run.seen["preempted"],
            "steps": len(run.running),
            "mean_running": round(sum(run.running) / len(run.running), 2),
            "most_running": max(run.running),
        }
    return figures


def main(requests: Annotated[int, typer.Option(help="Requests that wait.")] = 1000) -> None:
    """Print the figures, the last line as JSON."""
    environment.use_cpu()  # before vLLM is imported
    logging.disable(logging.ERROR)
    figures = saturate(requests)
    for name, found in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
