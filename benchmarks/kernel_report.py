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
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from common import aligned, make_parser, with_paths
from kernel_launches import SHARED_BYTES, Case, compiling, full_matrix, launch, reduced_matrix
from rich.console import Console
from rich.progress import track
from sass import Instruction, decode_parts, hot_loop, instructions, loops

from sparsemm_vllm.files import write_whole
from sparsemm_vllm.triton_kernels import triton_ops
from sparsemm_vllm.triton_kernels.occupancy import Multiprocessor

MULTIPROCESSORS = {
    arch: Multiprocessor(65536, shared + 1024, 2048) for arch, shared in SHARED_BYTES.items()
}

CONFIGURATION = ("triton", "target", "dtype", "D", "P", "G", "Q", "n", "single", "variant")

Row = dict[str, Any]


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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        found = track(
            pool.map(rows_of, distinct), "launches", len(distinct), console=Console(stderr=True)
        )
        for case, compiled_rows in zip(distinct, found, strict=True):
            for row in compiled_rows:
                rows.setdefault(row.pop("hash", str(case)), row)
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
    return aligned(lines, str.ljust, str.ljust)


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
