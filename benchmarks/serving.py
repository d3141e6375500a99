"""Dense vLLM against SPARSEMM under load: servers with the same memory, asked the same.

    python benchmarks/serving.py                    # all that is missing, for some 7 minutes
    python benchmarks/serving.py --only unique-512  # one scenario
    python benchmarks/serving.py --quick            # a single scenario in its smallest form
    python benchmarks/serving.py --variants dense,sparsemm

Four servers by default: dense and SPARSEMM, each with a cache of the model's type and with one of
fp8, which has twice the blocks in the same memory (four times where the model is float32). A
scenario's requests are put to each of them by `vllm bench serve`, at rates from light to all at
once; `/metrics` is read meanwhile. With a GPU: 7B models of random weights and CUDA graphs, dense
attention by FLASH_ATTN, all at the same ``--gpu-memory-utilization``. Without: the bundled model
in a small block pool; how many run at once, blocks and preemptions are what they are, but times
say nothing, since Triton is interpreted and attention is torch.

Every cell, one server under one load, is saved at once and never measured again. A server that is
started measures all its missing cells, since a start takes longer than most of them; which server
comes first changes from model to model. After the cell that crosses `--pieces-of` seconds the
command ends and says what is left: exit status 3; 1 if a load failed, which loses no other cell.

Needs what vLLM needs, and no network.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import models
from common import ROOT, TIME_IS_OVER, make_parser
from speed.chat import hold_chats, warm_up
from speed.command import measure_groups
from speed.load import SERVED, Bench, LoadError, put_load
from speed.plans import plans_for
from speed.results import Deadline, Results
from speed.scenarios import Chats, Load, Plan, Scenario, write_requests
from speed.side_by_side import beside
from speed.variants import FOUR, VARIANTS, add_option, served_here

from sparsemm_vllm.commands.server import Server, ServerError
from sparsemm_vllm.environment import has_gpu, use_cpu
from sparsemm_vllm.reader import READER, reader_folder

WORK = ROOT / ".cache" / "serving"
ON_CPU = "mean nothing: a CPU, Triton is interpreted, attention is torch; blocks and requests count"
ON_GPU = "of the device"
HEAD_SIZE = 128  # elements, of the 7B models; the CPU's backends take any
START_SECONDS = 900  # that a server may take to start
# /reset_prefix_cache, so that a cell does not depend on those before it; and no network.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Cell:
    """One server, named by its variant, under one load or in chats."""

    model: str
    server: str
    scenario: Scenario | Chats
    load: Load | None

    @property
    def kind(self) -> str:
        """What is asked, whichever server is."""
        if self.load is None:
            return f"{self.model}, chats"
        return f"{self.model}, {self.scenario.name}, {self.load.rate} requests/s"

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.server}"


def cells_of(plan: Plan, server: str, only: Sequence[str] = ()) -> list[Cell]:
    """A server's cells, in the order in which they are measured.

    Args:
        plan: model, scenarios and loads.
        server: name of its variant.
        only: names of scenarios, or "chats"; nothing means all.
    """
    found = [
        Cell(plan.model, server, scenario, load)
        for scenario in plan.scenarios
        if not only or scenario.name in only
        for load in scenario.loads
    ]
    if plan.chats is not None and (not only or "chats" in only):
        found.append(Cell(plan.model, server, plan.chats, None))
    return found


def visits(
    plans: Sequence[Plan], only: Sequence[str] = (), servers: Sequence[str] = FOUR
) -> list[tuple[Plan, list[Cell]]]:
    """The servers in the order in which they are started: ABBA, so that drift meets all alike.

    Args:
        plans: plans, one for each model.
        only: names of scenarios, or "chats"; nothing means all.
        servers: names of variants.
    """
    order = []
    for number, plan in enumerate(plans):
        turn = servers if number % 2 == 0 else servers[::-1]
        order += [(plan, cells_of(plan, server, only)) for server in turn]
    return order


def server_options(plan: Plan, server: str, folder: Path, pictures: Path) -> list[str]:
    """Arguments of `vllm serve`.

    Args:
        plan: model and memory.
        server: name of its variant.
        folder: folder of the model.
        pictures: folder that the server may open pictures in.
    """
    words = [*plan.options, "--served-model-name", SERVED, "--enable-prompt-tokens-details"]
    words += ["--seed", "0", "--allowed-local-media-path", str(pictures)]
    words += VARIANTS[server].words
    if VARIANTS[server].method is None:
        return [*words, *plan.dense]
    profile = folder / "profile.json"  # of a model that is not known by its name
    own = plan.sparsemm | ({"profile": str(profile)} if profile.exists() else {})
    config = json.dumps({"sparsemm": own})
    return [*words, "--attention-backend", "SPARSEMM", "--additional-config", config]


def model_folder(model: str) -> Path:
    """Where a model lies; made, if need be."""
    return reader_folder() if model == READER else models.prepare(model)


def measure_cell(
    bench: Bench, work: Path, plan: Plan, cell: Cell, server: tuple[str, Path]
) -> dict[str, Any]:
    """One cell, of a server that is ready: its URL and the folder of its model.

    Raises:
        LoadError: if it cannot be trusted.
    """
    (url, model), folder = server, Path(tempfile.mkdtemp(dir=work))
    try:
        warm_up(url, folder, cell.scenario.pictures, plan.warm_up)
        if cell.load is None:
            return hold_chats(url, folder, cell.scenario)
        requests = write_requests(folder, cell.scenario, cell.load)
        numbers = put_load(bench, url, model, requests, cell.scenario, cell.load)
    finally:
        shutil.rmtree(folder)
    pruned = cell.load.requests if VARIANTS[cell.server].method else 0
    if numbers["pruned_requests"] != pruned:
        raise LoadError(f"{cell.name}: {numbers['pruned_requests']} prompts were pruned")
    return numbers


def measure(
    plans: Sequence[Plan],
    results: Results,
    deadline: Deadline,
    work: Path = WORK,
    only: Sequence[str] = (),
    servers: Sequence[str] = FOUR,
) -> list[str]:
    """Measure what is missing, until the time is over.

    Args:
        plans: plans, one for each model.
        results: file that cells are added to.
        deadline: end of the time; the cell that crosses it is the last.
        work: folder for logs and pictures.
        only: names of scenarios, or "chats"; nothing means all.
        servers: names of variants.

    Returns:
        Names of the cells that are left.

    Raises:
        LoadError: if a load was not done as asked.
        ServerError: if a server does not start, or died.
    """
    work.mkdir(parents=True, exist_ok=True)
    todo = [(plan, cells) for plan, cells in visits(plans, only, servers) if cells]
    names = [cell.name for _, cells in todo for cell in cells]
    left = [name for name in names if name not in results.cells]
    if not left:
        return left
    with contextlib.closing(Bench(work / "bench.log")) as bench:
        groups = [
            (
                partial(started, plan, cells[0].server, work),
                {cell.name: partial(measure_cell, bench, work, plan, cell) for cell in cells},
            )
            for plan, cells in todo
        ]
        measure_groups(results, groups, deadline)
    return [name for name in left if name not in results.cells]


@contextlib.contextmanager
def started(plan: Plan, server: str, work: Path) -> Iterator[tuple[str, Path]]:
    """A server that answers; gives its URL and the folder of its model."""
    folder = model_folder(plan.model)
    options = server_options(plan, server, folder, work)
    log = work / f"{plan.model}-{server}.log"
    print(f"starting: {plan.model}, {server}, log {log}", flush=True)
    with Server(str(folder), options, log, ENVIRONMENT) as running:
        running.wait_until_ready(START_SECONDS)
        yield running.url, folder


def print_tables(plans: Sequence[Plan], results: Results) -> None:
    """All cells that there are, the servers side by side."""
    for plan in plans:
        for cell in cells_of(plan, FOUR[0]):
            named = {server: replace(cell, server=server).name for server in FOUR}
            found = {s: results.cells[name] for s, name in named.items() if name in results.cells}
            if found:
                purpose = "first tokens" if cell.load is None else cell.scenario.purpose
                print("", *beside(f"{cell.kind}: {purpose}", found), sep="\n")


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one scenario, two small loads")
    add_option(parser)
    parser.add_argument("--only", default="", help="scenarios, separated by commas; or chats")
    parser.add_argument(
        "--pieces-of", type=float, default=450, metavar="SECONDS", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, help="file of the results; today's if not given")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of logs (%(default)s)")
    args = parser.parse_args()
    deadline = Deadline(args.pieces_of)
    cpu = not has_gpu()
    if cpu:
        use_cpu()  # before anything imports vLLM
    plans = plans_for(cpu, args.quick)
    only = list(filter(None, args.only.split(",")))
    known = {scenario.name for plan in plans for scenario in plan.scenarios} | {"chats"}
    if unknown := set(only) - known:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    benchmark = "serving-quick" if args.quick else "serving"
    asked = {"times": ON_CPU if cpu else ON_GPU, "plans": [asdict(plan) for plan in plans]}
    results = Results.of(benchmark, asked, cpu, args.out)
    servers, skipped = served_here(args.variants, HEAD_SIZE, "float32" if cpu else "bfloat16")
    results.skipped.update(skipped)
    try:
        left = measure(plans, results, deadline, args.work.resolve(), only, servers)
    except (LoadError, ServerError, httpx.HTTPError) as error:
        print(f"failed: {error!r}\nlogs: {args.work}", file=sys.stderr)
        return 1
    finally:
        print_tables(plans, results)
    print(
        f"\n{results.file}: {len(results.cells)} cells",
        *(f"left: {name}" for name in left),
        sep="\n",
    )
    return TIME_IS_OVER if left else 0


if __name__ == "__main__":
    sys.exit(main())
