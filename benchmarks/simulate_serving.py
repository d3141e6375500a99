"""vLLM's real scheduler with 1,000 requests and no model: what pruning does to a full KV cache.

    python benchmarks/simulate_serving.py                # 1,000 requests, writes the JSON
    python benchmarks/simulate_serving.py --requests 100

The same trace runs through vLLM's scheduler and block pool with dense attention and with SPARSEMM.
Admission, chunks, preemption and blocks are the real ones; the time of a step is not measured but
follows from the floor of an H200 (bytes over bandwidth, FLOP over peak) for a model of the size of
Vicuna-7B, so the makespan tells what the freed blocks are worth, not what kernels achieve. The CPU
time of the scheduler is measured. The heads' scores are synthetic, with the concentration that the
published scores of LLaVA-NeXT have: the top 5 % of the heads hold 55 % of the mass, the top 10 %
77 %.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, code_version
from rich.console import Console
from rich.table import Table

from sparsemm_vllm import environment
from sparsemm_vllm.files import write_json

RESULT = RESULTS / "simulated-serving.json"

console = Console()


def print_report(document: dict[str, Any]) -> None:
    """The figures side by side."""
    table = Table("", "dense", "sparsemm", title=f"{document['requests']} simulated requests")
    for key in document["dense"]:
        table.add_row(
            key.replace("_", " "), str(document["dense"][key]), str(document["sparsemm"][key])
        )
    cpu = document["decode_step_cpu"]
    row = [f"{cpu[name]['median_ms']:.2f}" for name in ("dense", "sparsemm")]
    table.add_row(f"CPU ms a step, {document['max_num_seqs']} decoding", *row)
    console.print(table)
    console.print(
        f"{document['times_the_requests_at_once']} times the requests at once, "
        f"{document['times_faster']} times faster, scheduler CPU {cpu['ratio']:.2f} of dense"
    )


def main(
    requests: Annotated[int, typer.Option(help="Requests of the trace.")] = 1000,
    dense_requests: Annotated[int, typer.Option(help="That the pool holds, dense.")] = 20,
    budget: Annotated[int, typer.Option(help="Tokens per KV head.")] = 256,
    seed: Annotated[int, typer.Option(help="Of trace and scores.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULT,
) -> None:
    """Simulate serving with dense attention and with SPARSEMM, and write down the figures."""
    environment.use_cpu()  # before vLLM is imported
    from simulated.serving import simulate

    document = simulate(requests, dense_requests, budget, seed)
    document["commit"] = code_version()["commit"]
    document["versions"] = {name: version(name) for name in ("vllm", "torch", "sparsemm-vllm")}
    print_report(document)
    write_json(out, document)
    console.print(json.dumps(document), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
