"""Predicted time of decode attention, from its schedule and its machine code: no GPU is needed.

    python benchmarks/decode_model.py                   # a table: models, batches, budgets, devices
    python benchmarks/decode_model.py json              # the same as one JSON array
    python benchmarks/decode_model.py markdown          # before and after, as a page
    python benchmarks/decode_model.py costs --triton FOLDER   # compile again, and write the costs

What one layer takes is the largest of three, and the launch:

* the **longest program**: cycles of one warp for what the schedule gives it: beginnings of items,
  KV tiles, ends of items, parts that are stored or combined (`sass.py` reads them from the machine
  code; +-30 %), and the memory's answer to an item's first tile;
* the **busiest multiprocessor**: instructions of all warps over its four schedulers;
* the **bytes**: kept keys and values over the bandwidth with which the device reads, after the
  beginning of the first item. These alone, without a beginning, are the floor.

It knows nothing of waiting for memory, but for an item's first tile. On one H200 (2026-11-28,
Triton 3.6.0, 26 cases) launches took 0.96 to 1.93 times the prediction; large unpruned batches of
bf16 1.03 to 1.22 times. If every tile waited 2,400 cycles more, and the first one of an item 3,000
instead of 600, 23 of 24 cases would be met within 25 %.

The costs lie in ``benchmarks/results/decode-costs.json``, by version of Triton; an entry "before"
is the kernel that had a second one to combine parts, and a schedule that balanced tiles only. The
GPU suite prints this model's prediction beside each measurement.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
from common import HERE, RESULTS, aligned, make_parser, markdown
from sass import DecodeParts, Part

from sparsemm_vllm.files import write_whole

COSTS = RESULTS / "decode-costs.json"
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction a cycle
FIRST_TILE_CYCLES = 600  # from asking DRAM to the first tile of an item: assumed
WINDOW = 32


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: name of the GPU.
        bandwidth: bytes read from memory in a second.
        multiprocessors: number of multiprocessors.
        clock: cycles of a second.
        launch_us: time from the end of the kernel before to the first instruction, in a CUDA
            graph, in microseconds.
    """

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float = 1.755e9
    launch_us: float = 2.0


# Bandwidth as measured by copying on such machines; launch time assumed.
DEVICES = {
    "h100": Device("H100", 3.0e12, 132),
    "h200": Device("H200", 4.3e12, 132),
}


@dataclass(frozen=True)
class Costs:
    """A compiled decode kernel.

    Attributes:
        parts: pieces that it does again and again, and their cycles.
        block_n: tokens of a KV tile.
        num_warps: warps of a program.
        programs_each: programs that a multiprocessor runs at once.
        setup_tiles: work that the schedule counts for beginning and ending an item, in tiles.
        combine_us: time of a second kernel that combines parts; 0 without one.
        parts_each: parts that a round of the combination takes.
    """

    parts: DecodeParts
    block_n: int
    num_warps: int
    programs_each: int
    setup_tiles: int = 1
    combine_us: float = 0.0
    parts_each: int = 16

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """What `asdict` made."""
        parts = {name: Part(**part) for name, part in values["parts"].items()}
        return cls(**values | {"parts": DecodeParts(**parts)})


def read_costs() -> dict[str, dict[str, Costs]]:
    """Costs by version of Triton ("3.7.1", and of the kernel before: "3.7.1 before") and by heads.

    The latter as in "bf16 G=7": type of the cache, and query heads of a KV head.
    """
    found = json.loads(COSTS.read_text())
    return {
        version: {heads: Costs.of(values) for heads, values in by_heads.items()}
        for version, by_heads in found.items()
    }


@dataclass(frozen=True)
class Prediction:
    """Time of one layer, and why.

    Attributes:
        us: time in microseconds.
        floor_us: time of the bytes at the bandwidth, in microseconds.
        bound: name of what decides: "program", "instructions" or "bytes".
        busiest: work of the longest program over the mean of all, in cycles.
        items: items of the longest program.
    """

    us: float
    floor_us: float
    bound: str
    busiest: float
    items: int


def first_tiles(tokens: np.ndarray, costs: Costs) -> np.ndarray:
    """The schedule's running sum of work, as `schedule_decode` writes it.

    Args:
        tokens: tokens of each item, ``[items]``.
        costs: kernel that the schedule is for.

    Returns:
        Work before each item, and of all, ``[items + 1]``.
    """
    work = np.where(tokens > 0, costs.setup_tiles - (-tokens // costs.block_n), 0)
    return np.concatenate([[0], work.cumsum()])


def program_cycles(
    first_tile: np.ndarray, programs: int, costs: Costs
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What one layer's schedule costs each program.

    Args:
        first_tile: running sum of work, ``[items + 1]``.
        programs: programs of the launch.
        costs: compiled kernel.

    Returns:
        Cycles of a warp, instructions of a warp, and items, ``[programs]`` each.
    """
    total = int(first_tile[-1])
    share = max(1, -(-total // programs))
    cuts = np.unique(np.concatenate([first_tile, np.arange(0, total, share), [total]]))
    start, stop = cuts[:-1], cuts[1:]
    program = start // share
    item = np.searchsorted(first_tile, start, side="right") - 1
    begin, end = first_tile[item] + costs.setup_tiles, first_tile[item + 1]
    tiles = stop - np.maximum(start, begin)
    used = tiles > 0
    first_program, last_program = begin // share, (end - 1) // share
    whole = first_program == last_program
    split = used & ~whole
    # The last of an item's programs combines: which one that is, is not known before.
    combines = split & (program == last_program) & (costs.combine_us == 0)
    rounds = (last_program - first_program) // costs.parts_each  # further ones

    def add(name: str, extra: float = 0.0) -> np.ndarray:
        cost = {part: getattr(getattr(costs.parts, part), name) for part in asdict(costs.parts)}
        segment = used * (cost["begin"] + extra) + tiles.clip(min=0) * cost["tile"]
        segment = segment + (used & whole) * cost["end"] + split * cost["split"]
        segment = segment + combines * (cost["combine"] + rounds * cost["round"])
        return np.bincount(program, segment, programs)

    items = np.bincount(program, used, programs)
    return add("cycles", FIRST_TILE_CYCLES), add("instructions"), items


def predict(
    first_tile: Sequence[np.ndarray],
    token_bytes: float,
    tokens: float,
    costs: Costs,
    device: Device,
) -> Prediction:
    """A layer's time, on average over the layers.

    Args:
        first_tile: running sums of work of each layer's schedule, ``[items + 1]`` each.
        token_bytes: bytes of a token's keys and values in one head.
        tokens: tokens of all items of a layer, on average.
        costs: compiled kernel.
        device: GPU that it runs on.
    """
    programs = costs.programs_each * device.multiprocessors
    floor = 1e6 * tokens * token_bytes / device.bandwidth
    begin = 1e6 * (costs.parts.begin.cycles + FIRST_TILE_CYCLES) / device.clock
    times, bounds, busiest, most = [], [], [], []
    for layer in first_tile:
        cycles, instructions, items = program_cycles(np.asarray(layer), programs, costs)
        each = instructions.reshape(costs.programs_each, -1).sum(0)  # of a multiprocessor
        issue = each.max() * costs.num_warps / SCHEDULERS
        by = {
            "program": 1e6 * cycles.max() / device.clock,
            "instructions": 1e6 * issue / device.clock,
            "bytes": begin + floor,
        }
        bound = max(by, key=lambda name: by[name])
        times.append(by[bound] + device.launch_us + costs.combine_us)
        bounds.append(bound)
        busiest.append(cycles.max() / max(1.0, cycles.mean()))
        most.append(int(items[cycles.argmax()]))
    return Prediction(
        float(np.mean(times)),
        floor,
        max(set(bounds), key=bounds.count),
        float(np.max(busiest)),
        max(most),
    )


@dataclass(frozen=True)
class Attention:
    """A model's attention: layers, query heads, KV heads, head size; and its parameters."""

    name: str
    L: int
    Hq: int
    Hkv: int
    D: int
    parameters: float = 0.0

    @property
    def G(self) -> int:  # noqa: N802
        """Query heads of a KV head."""
        return self.Hq // self.Hkv


MODELS = VICUNA, QWEN = (
    Attention("vicuna-7b", 32, 32, 32, 128, 6.7e9),
    Attention("qwen2-vl-7b", 28, 28, 4, 128, 7.6e9),
)


def layer_tokens(model: Attention, n: int, batch: int, budget: int | None) -> np.ndarray:
    """Tokens of each item in the first decode step of equal prompts, ``[L, batch * Hkv]``.

    Budgets follow scores that are as concentrated as the published ones.

    Args:
        model: attention of the model.
        n: prompt tokens.
        batch: requests.
        budget: tokens per KV head; None for dense attention.
    """
    from models.head_scores import concentrated_scores

    from sparsemm_vllm.budget.layout import CacheLayout

    kept = np.full((model.L, model.Hkv), n + 1)
    if budget is not None:
        scores = concentrated_scores(model.L, model.Hq, seed=7)
        layout = CacheLayout.from_scores(scores, model.Hkv, budget, WINDOW)
        if layout.is_pruned(n):
            kept = layout.kept_tokens(n) + WINDOW + 1
    return np.tile(kept, (1, batch))


def predict_step(
    model: Attention,
    n: int,
    batch: int,
    budget: int | None,
    costs: Costs,
    device: Device,
    element_bytes: int = 2,
) -> Prediction:
    """A layer's time in the first decode step of equal prompts."""
    tokens = layer_tokens(model, n, batch, budget)
    schedule = [first_tiles(layer, costs) for layer in tokens]
    token_bytes = 2 * model.D * element_bytes
    return predict(schedule, token_bytes, float(tokens.sum(1).mean()), costs, device)


def rows() -> Iterator[dict[str, Any]]:
    """Predictions of all combinations, one row for each version of Triton side by side."""
    found = read_costs()
    sizes = (8192, 32768), (1, 8, 32), (256, 1024, None)
    for model, n, batch, budget, device in product(MODELS, *sizes, DEVICES.values()):
        row: dict[str, Any] = {"model": model.name, "prompt": n, "batch": batch}
        row |= {"budget": budget or "dense", "device": device.name}
        for name, by_heads in found.items():
            costs = by_heads[f"bf16 G={model.G}"]
            p = predict_step(model, n, batch, budget, costs, device)
            row["floor_us"] = round(p.floor_us, 1)
            row[name] = round(p.us, 1)
            row[f"{name} bound"] = p.bound
        yield row


def compile_costs(triton: Path | None) -> dict[str, Any]:
    """Costs of the kernel as it stands, by a version of Triton; for 16-bit heads of 128 on sm_90.

    Args:
        triton: folder with another version's package; the installed one if not given.
    """
    command = [sys.executable, str(HERE / "kernel_report.py"), "--decode-costs"]
    command += ["--triton", str(triton)] if triton else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def table() -> str:
    """All predictions, aligned."""
    found = list(rows())
    columns = [name for name in found[0] if not name.endswith(" bound")]
    lines = [columns, *([str(row[name]) for name in columns] for row in found)]
    return aligned(lines, str.rjust, str.rjust)


PAGE = """# Predicted time of decode attention

Microseconds per layer, from the schedule and the machine code (`python benchmarks/decode_model.py
markdown` wrote this page). **Nothing here was measured.** An H200's
[measurements](nvidia-h200/2026-11-28/summary.md) with Triton 3.6.0 show that programs wait for
memory longer than the model thinks: launches took 0.96 to 1.93 times these times, large unpruned
batches 1.03 to 1.22 times. A column is a version of Triton. Where two times stand, the first one is
the kernel up to November 2026, whose parts were combined by a second one; no GPU has run it, and
Triton 3.8 has not compiled it. The floor is the kept keys and values over the bandwidth. One decode
step right after the prompts were pruned; bf16; budgets follow scores that are as concentrated as
the published ones; "dense" is our kernel without pruning.
"""


def page() -> str:
    """All predictions, before and after, for both devices."""
    versions = [name for name in read_costs() if "before" not in name]
    heads = [f"{d.name}, {v}" for d in DEVICES.values() for v in ("floor", *versions)]
    cells: dict[tuple[Any, ...], list[str]] = {}
    for row in rows():
        key = row["model"], f"{row['prompt']:,}", row["batch"], row["budget"]
        now = [_before_and_now(row, version) for version in versions]
        cells.setdefault(key, []).extend([str(row["floor_us"]), *now])
    rows_of_cells = [(*key, *found) for key, found in cells.items()]
    lines = markdown(("model", "prompt", "batch", "budget", *heads), rows_of_cells)
    return PAGE + "\n" + "\n".join(lines) + "\n"


def _before_and_now(row: dict[str, Any], version: str) -> str:
    before = f"{row[f'{version} before']} -> " if f"{version} before" in row else ""
    return f"{before}**{row[version]}**"


def main() -> None:
    parser = make_parser(__doc__)
    commands = ("table", "json", "markdown", "costs")
    parser.add_argument("command", nargs="?", choices=commands, default="table")
    parser.add_argument(
        "--triton", type=Path, nargs="*", default=[], help="folders with other versions' packages"
    )
    options = parser.parse_args()
    if options.command == "costs":
        known = json.loads(COSTS.read_text())
        for folder in (None, *options.triton):
            known |= compile_costs(folder)
        write_whole(COSTS, json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(COSTS)
    elif options.command == "json":
        print(json.dumps(list(rows())))
    else:
        print(table() if options.command == "table" else page(), end="")


if __name__ == "__main__":
    main()
