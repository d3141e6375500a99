"""Every launcher against its torch twin, over types, sizes, layouts; decoding in a CUDA graph."""

import itertools
from functools import partial
from typing import Any

import torch

from gpu_parts.device import Cases, Context, Device
from gpu_parts.scene import HKV, ROWS, L, Scene, relayout, tensors
from sparsemm_vllm.triton_kernels import triton_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Rows

NEEDS = 20

LAYOUTS = ("LBHNC", "LBNHC")  # head-major pages, which are served, and token-major ones
# Values of serving first: cases come in this order.
AXES: dict[str, tuple[Any, ...]] = {
    "dtype": ("bf16", "fp8", "fp16", "fp32"),  # fp8: of the cache, beside bf16 queries
    "D": (128, 64, 80, 96, 256, 32),
    "P": (16, 32, 64, 128),
    "G": (1, 4, 7, 16),
    "Q": (1, 4, 16),
    "layout": LAYOUTS,
}
DRY_AXES = {"dtype": ("fp8", "fp32"), "D": (80, 32), "P": (16,), "G": (1, 4), "Q": (1, 4)}

# What serving launches most, looked at before anything else: dtype, G, Q, layout; D 128, P 16.
FIRST = [
    ("bf16", 1, 1, "LBHNC"),
    ("bf16", 4, 1, "LBHNC"),
    ("bf16", 7, 1, "LBHNC"),
    ("bf16", 7, 4, "LBHNC"),
    ("fp8", 4, 1, "LBHNC"),
    ("bf16", 1, 1, "LBNHC"),
    ("bf16", 4, 1, "LBNHC"),
    ("bf16", 7, 4, "LBNHC"),
]
DRY_FIRST = [("fp32", 1, 1, "LBHNC"), ("fp8", 4, 1, "LBNHC")]
GRAPHS = [(G, Q) for Q in (1, 4) for G in (1, 4, 7)]
FIRST_GRAPHS = [(1, 1), (7, 4)]
DRY_GRAPHS = [(4, 1)]

# Options of the decode kernel that are off by default; G and Q.
VARIANTS = [
    ({option: True}, G, Q) for option in ("lists_pages", "pdl") for G, Q in ((1, 1), (7, 1), (7, 4))
]
DRY_VARIANTS = [({"lists_pages": True}, 4, 1)]


def pairwise(axes: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few combinations in which any value of an axis meets any of every other axis."""
    missing = {
        ((a, x), (b, y)): None  # a dict keeps the order
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
    }
    combinations = []
    while missing:
        case = dict(next(iter(missing)))
        for axis in axes:
            if axis not in case:
                case[axis] = max(axes[axis], key=partial(_new_pairs, missing, case, axis))
        for pair in [pair for pair in missing if all(case[a] == x for a, x in pair)]:
            del missing[pair]
        combinations.append({axis: case[axis] for axis in axes})
    return combinations


def _new_pairs(missing: dict[Any, None], case: dict[str, Any], axis: str, value: Any) -> int:
    known = {*case.items(), (axis, value)}
    return sum((axis, value) in pair and known.issuperset(pair) for pair in missing)


def check(device: Device, **case: Any) -> dict[str, Any]:
    """All launchers on one scene, spread over few programs and over all."""
    if case["dtype"] == "fp8" and not device.has_fp8:
        return {"skipped": "Triton does not convert e4m3 on this device"}
    scene = Scene(device, **case)
    errors = scene.check_prune()
    scene.check_slots()
    errors["sparse_decode"] = max(map(scene.check_decode, scene.programs()))
    return {"errors": errors, "tolerance": scene.tolerance}


def served(device: Device) -> dict[str, Any]:
    """Sizes of what is served, or tiny ones."""
    return {"dtype": "fp32" if device.dry else "bf16", "D": 32 if device.dry else 128, "P": 16}


def check_variant(device: Device, G: int, Q: int, **changes: Any) -> dict[str, Any]:
    """Decoding as it is not launched by default."""
    scene = Scene(device, **served(device), G=G, Q=Q, layout=LAYOUTS[0])
    scene.check_prune()
    error = max(scene.check_decode(programs, **changes) for programs in scene.programs())
    return {"errors": {"sparse_decode": error}, "tolerance": scene.tolerance}


def check_graph(device: Device, G: int, Q: int, layout: str, **changes: Any) -> dict[str, Any]:
    """Captured once with no requests, replayed for others: as a serving engine does it."""
    case = served(device) | {"G": G, "Q": Q, "layout": layout}
    scenes = [Scene(device, **case, real=real, seed=seed) for real, seed in ((5, 0), (3, 1))]
    for scene in scenes:
        scene.check_prune()
    first = scenes[0]
    # What the graph sees is as large as the larger scene.
    B = max(scene.cache.shape[1] for scene in scenes)
    width = max(scene.block_table.shape[1] for scene in scenes)
    cache = torch.full((L, B, HKV, 16, 2 * first.D), torch.nan, device=device.torch)
    cache = relayout(cache.to(first.cache.dtype), layout)
    table = torch.zeros(ROWS, width, dtype=torch.int32, device=device.torch)
    query = torch.zeros_like(first.query)
    outputs = [torch.empty_like(query) for _ in range(L)]
    start, seq_lens = map(torch.zeros_like, (first.rows.query_start, first.rows.seq_lens))
    pages = HeadPages(*map(torch.zeros_like, tensors(first.pages)))
    batch = first.batch(2 * device.multiprocessors, **changes)

    def schedule(requests: torch.Tensor) -> None:
        rows = Rows(table, start, seq_lens, requests)
        triton_ops.schedule_decode(batch, pages, first.W, 16, rows)

    def decode() -> None:
        for layer, output in enumerate(outputs):
            args = table, batch, output, first.D**-0.5
            triton_ops.sparse_decode(query, cache, layer, *args)

    schedule(first.rows.requests[:0])
    replay = device.graph(decode)
    errors = []
    for scene in (scenes[0], scenes[1], scenes[0]):
        cache.fill_(torch.nan)[:, : scene.cache.shape[1]] = scene.cache
        table.zero_()[:, : scene.block_table.shape[1]] = scene.block_table
        query.copy_(scene.query)
        start.copy_(scene.rows.query_start)
        seq_lens.copy_(scene.rows.seq_lens)
        for mine, its in zip(tensors(pages), tensors(scene.pages), strict=True):
            mine.copy_(its)
        for output in outputs:
            output.fill_(torch.nan)
        schedule(scene.rows.requests)
        replay()
        errors.append(scene.compare(outputs))
    return {"errors": {"sparse_decode": max(errors)}, "tolerance": first.tolerance}


def smoke_cases(device: Device) -> Cases:
    """The few launches that serving makes most, then decoding in a graph; names begin alike."""
    first, graphs = (DRY_FIRST, DRY_GRAPHS) if device.dry else (FIRST, FIRST_GRAPHS)
    D = 32 if device.dry else 128
    found = {}
    for dtype, G, Q, layout in first:
        case = {"dtype": dtype, "D": D, "P": 16, "G": G, "Q": Q, "layout": layout}
        found[f"smoke {_name(case)}"] = partial(check, device, **case)
    return found | {f"smoke {name}": case for name, case in _graphs(device, graphs).items()}


def _name(case: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


def _graphs(device: Device, sizes: list[tuple[int, int]]) -> Cases:
    """Graphs of these `G` and `Q`, by turns in one layout and in the other."""
    cases = [{"G": G, "Q": Q, "layout": LAYOUTS[(G + Q) % 2]} for G, Q in sizes]
    return {f"graph {_name(case)}": partial(check_graph, device, **case) for case in cases}


def cases(context: Context) -> Cases:
    """A first look, graphs and variants, then a covering selection of sizes, the served first."""
    device = context.device
    axes = AXES | DRY_AXES if device.dry else AXES
    found = smoke_cases(device)
    for name, graph in _graphs(device, DRY_GRAPHS if device.dry else GRAPHS).items():
        if f"smoke {name}" not in found:
            found[name] = graph
    for changes, G, Q in DRY_VARIANTS if device.dry else VARIANTS:
        name = f"variant {' '.join(changes)} G={G} Q={Q}"
        found[name] = partial(check_variant, device, G, Q, **changes)
    if not device.dry:  # the interpreter has no graphs
        found["graph pdl G=1 Q=1"] = partial(check_graph, device, 1, 1, LAYOUTS[0], pdl=True)
    for case in sorted(pairwise(axes), key=partial(_distance, axes)):
        if f"smoke {_name(case)}" not in found:
            found[_name(case)] = partial(check, device, **case)
    return found


def _distance(axes: dict[str, tuple[Any, ...]], case: dict[str, Any]) -> tuple[int, ...]:
    """How far a case is from what is served: the later in the order, the farther."""
    dtype, *rest = (axes[name].index(case[name]) for name in ("dtype", "D", "P"))
    return (dtype, *(int(place > 0) for place in rest))
