"""What the GPU compiler makes of the Triton kernels, without a GPU: spills, load widths, memory.

    python benchmarks/kernel_report.py                 # a table; CI checks those of sm_90
    python benchmarks/kernel_report.py --json          # the same as one JSON array
    python benchmarks/kernel_report.py --full          # every supported configuration
    python benchmarks/kernel_report.py --kernel sparse_decode --target sm_90
    python benchmarks/kernel_report.py --triton FOLDER # with another version's package

`pip install --no-deps --target FOLDER triton==3.6.0` makes such a folder.

It calls the launchers that serving calls, with CPU tensors, while Triton believes in a GPU of the
target's kind and every launch ends after compiling. So a row is a kernel exactly as it is launched:
its tile sizes, warps, stages and argument specialisations. Compiled kernels stay in Triton's cache
on disk (``TRITON_CACHE_DIR``). Exit status 1 if a kernel spills, needs more shared memory than the
target has, or does not compile.

Columns:

* programs: programs that a multiprocessor runs at once;
* registers: 32-bit registers of a thread, of at most 255;
* spill_bytes: local memory of a thread, its stack frame included, as `cuobjdump -res-usage` tells
  it. Spilled registers live there, and nothing else in kernels without local arrays or calls, which
  these are; if in doubt, it counts too much;
* shared_bytes: shared memory of a program;
* widest_load, widest_store: bits that one instruction moves for one thread between global memory
  and registers, or from global to shared memory (asynchronous copies);
* wide_loads: the share of the bytes from global memory that instructions of 128 bits and more load,
  each counted once, however often it runs;
* wide_loop_loads: the same of the loads in loops, null if there are none. A loop is what lies
  between a backward branch and its target;
* loop_instructions, loop_cycles: instructions of a warp in the innermost loop with tensor-core
  instructions, and the cycles that one warp is expected to take, see `sass.py`; null without one;
* tile_tokens, begin_cycles: of sparse_decode, tokens that one turn of this loop reads, and cycles
  from beginning a head to its first tile.
"""

import functools
import gzip
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from common import aligned, make_parser, with_paths
from sass import Instruction, decode_parts, hot_loop, instructions, loops
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sparsemm_vllm.files import write_whole
from sparsemm_vllm.triton_kernels import triton_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, PruneWorkspace, QueryTiles, Rows
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.occupancy import Multiprocessor
from sparsemm_vllm.triton_kernels.tile_sizes import decode_queries, decode_rows

# Shared memory that a program may have, and what the programs of a multiprocessor share. Source:
# CUDA C++ programming guide, technical specifications per compute capability; of the former the
# system takes 1 KiB.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MULTIPROCESSORS = {
    arch: Multiprocessor(65536, shared + 1024, 2048) for arch, shared in SHARED_BYTES.items()
}

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,  # of the cache, beside bfloat16 queries
}
FIRST_FP8 = 89  # Triton cannot convert e4m3 on older targets

VARIANTS = (None, "pdl", "lists_pages")

CONFIGURATION = ("triton", "target", "dtype", "D", "P", "G", "Q", "n", "single", "variant")

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A configuration; what its kernel does not depend on is None.

    Attributes:
        op: name of the launcher.
        arch: compute capability, as in ``sm_90``.
        dtype: type of the cache, see `DTYPES`.
        D: head size.
        P: page size in tokens.
        G: query heads per KV head.
        Q: largest number of queries of a decode row.
        n: prompt tokens.
        single: whether it is a launch of layer 1 for one request and one KV head. Triton compiles
            arguments that are 1 as constants, which is a kernel of its own.
        variant: field of `DecodeOptions` that is switched on, "pdl" or "lists_pages".
    """

    op: str
    arch: int
    dtype: str | None = None
    D: int | None = None
    P: int | None = None
    G: int | None = None
    Q: int | None = None
    n: int | None = None
    single: bool = False
    variant: str | None = None


def full_matrix() -> Iterator[Case]:
    """Every supported configuration."""
    sizes = (DTYPES, (32, 64, 80, 96, 128, 256), (16, 32, 64, 128), (1, 4, 7), (1, 4, 16))
    for arch, dtype, D, P, G, Q in itertools.product(SHARED_BYTES, *sizes):
        yield from cases(arch, dtype, D, P, G, Q)
        if (P, G, Q) == (16, 1, 1):
            yield from cases(arch, dtype, D, P, G, Q, single=True)


def reduced_matrix() -> Iterator[Case]:
    """What CI has the time for."""
    for arch, dtype, D in itertools.product(SHARED_BYTES, ("bf16", "fp8"), (64, 128)):
        yield from cases(arch, dtype, D, 16, 4, 1)  # tiles of 16 queries
        yield from cases(arch, dtype, D, 16, 7, 16)  # of 64, of which 63 are used
    yield from cases(90, "bf16", 128, 16, 1, 1, single=True)
    for dtype, G, variant in itertools.product(("bf16", "fp8"), (1, 7), VARIANTS):
        yield Case("sparse_decode", 90, dtype, 128, 16, G, 1, variant=variant)


def cases(
    arch: int, dtype: str, D: int, P: int, G: int, Q: int, single: bool = False
) -> Iterator[Case]:
    """Each launcher's part of a configuration, without what it does not depend on."""
    if dtype == "fp8" and arch < FIRST_FP8:
        return
    yield Case("window_scores", arch, dtype, D, P, G, single=single)
    for n in (1001, 2001, 3001, 9001):  # tiles of 1024, 2048 and 4096 scores, and three of these
        yield Case("select_tokens", arch, n=n, single=single)
    yield Case("compact_kv", arch, dtype, D, P, single=single)
    yield Case("correct_slots", arch, P=P, single=single)
    yield Case("list_pages", arch, P=P, G=G, single=single)
    yield Case("schedule_decode", arch, dtype, D, None, G, Q, single=single)
    yield Case("sparse_decode", arch, dtype, D, P, G, Q, single=single)
    if Q == 16 or single:  # answers are recorded as a whole
        yield Case("top_keys", arch, dtype, D, P, G, Q, single=single)


def launch(case: Case) -> None:
    """Call the launcher of `case` as a serving step does."""
    D, P, G, Q = case.D or 128, case.P or 16, case.G or 1, case.Q or 1
    # L and Hkv of Vicuna-7B, Mistral-7B and Qwen2-VL-7B.
    L, Hkv = {1: (32, 32), 4: (32, 8), 7: (28, 4)}[G]
    layer, requests = 5, 3
    if case.single:
        Hkv, layer, requests = 1, 1, 1
    window, n, max_requests, max_blocks = 32, case.n or 3001, 7, 1001
    tokens = requests * n
    cpu = torch.device("cpu")

    dtype = DTYPES[case.dtype or "bf16"]
    scale = torch.ones(1) if dtype.itemsize == 1 else None
    # As served: a head's tokens of a block lie side by side. Nothing is read or written.
    cache = torch.empty(L, 3, Hkv, P, 2 * D, dtype=dtype)
    query = torch.empty(tokens, Hkv * G, D, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    table = torch.zeros(requests, max_blocks, dtype=torch.int32)
    lists_pages = case.op == "list_pages" or case.variant == "lists_pages"
    pages = HeadPages.empty(max_requests, L, Hkv, cpu, max_pages=20 * L * Hkv * lists_pages)
    query_start = torch.zeros(requests + 1, dtype=torch.int32)
    seq_lens = torch.zeros(requests, dtype=torch.int32)
    rows = Rows(table, query_start, seq_lens, torch.zeros(requests, dtype=torch.int32))
    prompts = Prompts.pack([(i, i, (i + 1) * n, n) for i in range(requests)], 1025, cpu)
    workspace = PruneWorkspace.allocate(requests * (n + 16), Hkv * G, Hkv, window, cpu)
    buffers = DecodeBuffers.allocate(requests * Q * G, L, Hkv, D, dtype, 132, cpu)
    batch = DecodeBatch.of(buffers, 0, requests, Q, G, page_units=pages.page_units)
    if case.variant is not None:
        batch = replace(batch, options=replace(batch.options, **{case.variant: True}))

    slots = torch.empty(tokens, dtype=torch.int64)
    block_q = decode_queries(Q, G, decode_rows(D, dtype))
    tiles = QueryTiles.pack([(i, i * n, Q, n, i * Q) for i in range(requests)], block_q, cpu)
    keys = torch.empty(tokens, Hkv * G, dtype=torch.int32)
    output = torch.empty_like(query)
    arguments: dict[str, tuple[Any, ...]] = {
        "window_scores": (query, cache[layer], table, prompts, workspace, window, 5, 0.1, scale),
        "select_tokens": (prompts, workspace, pages.lengths[:, layer], window),
        "compact_kv": (cache, layer, table, prompts, workspace, pages),
        "correct_slots": (slots, slots.clone(), rows, pages, P, Q),
        "list_pages": (cache, table, prompts, pages),
        "schedule_decode": (batch, pages, window, P, rows),
        "sparse_decode": (query, cache, layer, table, batch, output, 0.1, scale, scale),
        "top_keys": (query, cache[layer], table, tiles, keys),
    }
    getattr(triton_ops, case.op)(*arguments[case.op])


class Gpu:
    """Stands in for Triton's driver: a GPU that is only compiled for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its kernels in memory by device: one for each target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[JITFunction, Any, dict[str, Any]]]]:
    """While it lasts, launches end after compiling.

    Gives a list that fills: of each launch the function, Triton's compiled kernel, and the
    arguments that were given by name.
    """
    found = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs | {"warmup": True})
        found.append((self, kernel, kwargs))
        return kernel

    driver.set_active(Gpu(arch))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield found


def compiled(function: Callable[[], None], arch: int) -> list[Row]:
    """Rows of the kernels that `function` launches, which are compiled and do not run."""
    rows = []
    with compiling(arch) as found:
        function()
    for jit, kernel, given in found:
        name = f"{jit.__module__.rpartition('.')[2]}.{jit.__name__}"
        tile = given["BLOCK_N"] if jit.__name__ == "_sparse_decode" else None
        rows.append({"kernel": name, "hash": kernel.hash} | inspect(kernel, arch, tile))
    return rows


def listing(kernel: Any) -> str:
    """Resource usage and instructions of a `CompiledKernel`."""
    (path,) = (path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    return disassemble(Path(path))


def inspect(kernel: Any, arch: int, tile_tokens: int | None) -> Row:
    """Resources, load widths and hot loop of a `CompiledKernel`.

    Args:
        kernel: compiled kernel.
        arch: compute capability, as in ``sm_90``.
        tile_tokens: tokens of a KV tile, if it is the decode kernel.
    """
    text = listing(kernel)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    loop = hot_loop(text)
    resources = kernel.metadata.num_warps, int(usage["REG"]), kernel.metadata.shared
    return {
        "num_warps": kernel.metadata.num_warps,
        "programs": MULTIPROCESSORS[arch].programs(*resources),
        "registers": int(usage["REG"]),
        "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared_bytes": kernel.metadata.shared,
        **widths(text),
        "loop_instructions": loop and loop.instructions,
        "loop_cycles": loop and loop.cycles,
        "tile_tokens": tile_tokens,
        "begin_cycles": decode_parts(text).begin.cycles if loop and tile_tokens else None,
    }


@functools.cache
def disassemble(cubin: Path) -> str:
    """Resource usage and instructions, kept beside the kernel in Triton's cache."""
    listing = cubin.with_suffix(".sass.gz")
    if not listing.exists():
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", "-sass", str(cubin)]
        text = subprocess.run(command, capture_output=True, check=True).stdout
        write_whole(listing, gzip.compress(text, 1))
    return gzip.decompress(listing.read_bytes()).decode()


LOADS = ("LD", "LDG", "LDGSTS")
STORES = ("ST", "STG")
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def widths(sass: str) -> Row:
    """Widths of the accesses to global memory, in bits."""
    code = instructions(sass)
    loads = {x.address: width(x) for x in code if x.opcode in LOADS}
    inside = [at for at in loads if any(start <= at <= end for start, end in loops(code))]
    return {
        "widest_load": max(loads.values(), default=0),
        "widest_store": max((width(x) for x in code if x.opcode in STORES), default=0),
        "wide_loads": wide_share(loads.values()),
        "wide_loop_loads": wide_share([loads[at] for at in inside]),
    }


def width(access: Instruction) -> int:
    """Bits that an access to memory moves for one thread."""
    return min((WIDTHS[x] for x in access.mnemonic.split(".") if x in WIDTHS), default=32)


def wide_share(loads: Collection[int]) -> float | None:
    """Share of the bits that loads of 128 bits and more load."""
    total = sum(loads)
    return round(sum(bits for bits in loads if bits >= 128) / total, 3) if total else None


def rows_of(case: Case) -> list[Row]:
    """Compile what the launcher of `case` launches."""
    values = asdict(case) | {"target": f"sm_{case.arch}", "triton": triton.__version__}
    configuration = {name: values[name] for name in CONFIGURATION}
    try:
        rows = compiled(lambda: launch(case), case.arch)
    except Exception as error:  # a compiler error may be of any type; one row reports it
        failed = {"kernel": case.op, "error": f"{type(error).__name__}: {error}"}
        return [failed | configuration]
    return [{"kernel": row["kernel"]} | configuration | row for row in rows]


def problem(row: Row) -> str | None:
    """Why a kernel must not be launched like this."""
    if "error" in row:
        return str(row["error"])
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    limit = SHARED_BYTES[int(row["target"].removeprefix("sm_"))]
    if row["shared_bytes"] > limit:
        return f"needs {row['shared_bytes']} bytes of shared memory, of {limit}"
    return None


def failures(rows: list[Row]) -> list[str]:
    """A line for each kernel that must not be launched like this."""
    lines = []
    for row in rows:
        if why := problem(row):
            at = [f"{key}={row[key]}" for key in CONFIGURATION if row.get(key)]
            lines.append(f"{row['kernel']} {' '.join(at)}: {why}")
    return lines


def report(matrix: Iterable[Case]) -> list[Row]:
    """One row for each kernel that the matrix compiles, in its order."""
    distinct = list(dict.fromkeys(matrix))
    rows: dict[str, Row] = {}
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for done, (case, found) in enumerate(
            zip(distinct, pool.map(rows_of, distinct), strict=True), 1
        ):
            for row in found:
                rows.setdefault(row.pop("hash", str(case)), row)
            if done % 20 == 0 or done == len(distinct):
                print(
                    f"{done} of {len(distinct)} launches, {len(rows)} kernels, "
                    f"{time.monotonic() - started:.0f} s",
                    file=sys.stderr,
                )
    return list(rows.values())


def with_triton(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """This command with another version of Triton, whose package lies in a folder.

    Raises:
        SystemExit: if there is none.
    """
    if not (folder / "triton" / "__init__.py").exists():
        raise SystemExit(
            f"{folder} holds no triton package: "
            f"pip install --no-deps --target {folder} triton==VERSION"
        )
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=with_paths(folder), stdout=subprocess.PIPE, text=True)


def decode_costs() -> Row:
    """Costs of `sparse_decode` for `decode_model.py`, by the version of Triton and the heads."""
    found = {}
    for dtype, G in itertools.product(("bf16", "fp8"), (1, 7)):
        case = Case("sparse_decode", 90, dtype, 128, 16, G, 1)
        with compiling(90) as compiled_kernels:
            launch(case)
        ((_, kernel, given),) = compiled_kernels
        row = inspect(kernel, 90, given["BLOCK_N"])
        found[f"{dtype} G={G}"] = {
            "parts": asdict(decode_parts(listing(kernel))),
            "block_n": row["tile_tokens"],
            "num_warps": row["num_warps"],
            "programs_each": row["programs"],
            "parts_each": given["PARTS"],
        }
    return {triton.__version__: found}


def table(rows: list[Row]) -> str:
    """Rows of text, aligned."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "error"))
    lines = [columns]
    for row in rows:
        values = (row.get(column) for column in columns)
        lines.append(["-" if value is None else str(value) for value in values])
    return aligned(lines)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--full", action="store_true", help="every supported configuration")
    targets = [f"sm_{arch}" for arch in SHARED_BYTES]
    parser.add_argument("--target", choices=targets, help="this target only")
    parser.add_argument("--kernel", choices=triton_ops.__all__, help="this launcher's kernels only")
    parser.add_argument("--triton", type=Path, help="folder with another version's package")
    parser.add_argument("--decode-costs", action="store_true", help="for decode_model.py only")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    if options.triton is not None:
        at = sys.argv.index("--triton")
        done = with_triton(options.triton.resolve(), *sys.argv[1:at], *sys.argv[at + 2 :])
        print(done.stdout, end="")
        return done.returncode
    if options.decode_costs:
        print(json.dumps(decode_costs()))
        return 0

    matrix = full_matrix() if options.full else reduced_matrix()
    rows = report(
        case
        for case in matrix
        if options.target in (None, f"sm_{case.arch}") and options.kernel in (None, case.op)
    )
    print(json.dumps(rows) if options.json else table(rows))
    failed = failures(rows)
    print(*failed, sep="\n", end="\n" * bool(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
