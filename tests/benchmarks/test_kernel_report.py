"""The kernels compile for GPUs that are not here: no spills, 16-byte loads."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import kernel_report
import pytest
import torch
import triton
import triton.language as tl

from support.children import compiling, python
from support.paths import BENCHMARKS, ROOT

# Kernels that need no 16-byte loads: what they read is little beside keys and values.
NARROW = {
    "window_scores._pool",  # neighbours of each score: shifted by one, no load is aligned
    "correct_slots._correct_slots_kernel",  # a few tokens a row
    "schedule_decode._schedule_decode",  # lengths and query starts, gathered
    "list_pages._list_pages",  # block numbers, the same one for many pages
}

# The Triton of the machine on which kernels are measured; `make` puts it there.
OTHER_TRITON = ROOT / ".cache" / "triton-3.6.0"


def report(*options: str, **environment: str) -> subprocess.CompletedProcess:
    script = BENCHMARKS / "kernel_report.py"
    return python(script, "--json", *options, environment=compiling() | environment)


@cache
def reduced(target: str) -> list[dict]:
    """Rows of the reduced matrix. Two cores compile sm_90's in 30 s, or find them in 5 s.

    Compiled kernels stay in Triton's own cache, which outlives the run.
    """
    done = report("--target", target)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["target"] for row in rows} == {target}
    return rows


# Half of the matrix is for the target on which kernels are measured.
each_target = pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "sm_100"))]
)


@each_target
def test_nothing_spills(target):
    assert {row["spill_bytes"] for row in reduced(target)} == {0}


@each_target
def test_data_is_loaded_16_bytes_at_a_time(target):
    for row in reduced(target):
        if row["kernel"] not in NARROW:
            assert row["widest_load"] >= 128, row
            # The rest are indices: block table entries, positions, lengths.
            assert row["wide_loads"] >= 0.4, row
            assert row["wide_loop_loads"] is None or row["wide_loop_loads"] >= 0.5, row


def test_what_the_reduced_matrix_compiles():
    cases = list(dict.fromkeys(kernel_report.reduced_matrix()))
    assert len(cases) <= 160
    assert {case.arch for case in cases} == {80, 90, 100}
    covered = {(case.arch, case.dtype, case.D) for case in cases if case.op == "sparse_decode"}
    e4m3 = {(arch, "fp8", D) for arch in (90, 100) for D in (64, 128)}
    bf16 = {(arch, "bf16", D) for arch in (80, 90, 100) for D in (64, 128)}
    assert covered == e4m3 | bf16


def check_decode(rows):
    """What the decode kernel of most models was made to cost: bf16 or fp8, heads of 128."""
    decode = [r for r in rows if r["kernel"] == "sparse_decode._sparse_decode"]
    narrow = [r for r in decode if (r["target"], r["D"], r["Q"]) == ("sm_90", 128, 1)]
    assert {r["variant"] for r in narrow} == {None, "pdl", "lists_pages"}
    assert {r["dtype"] for r in narrow} == {"bf16", "fp8"}
    for row in narrow:
        assert row["programs"] == 2, row
        limit = 300 if row["dtype"] == "bf16" else 800  # fp8 values are converted
        assert row["loop_instructions"] * 64 / row["tile_tokens"] <= limit, row
        if (row["dtype"], row["G"], row["single"]) == ("bf16", 1, False):
            assert row["begin_cycles"] <= 1900, row
    assert not any(row["spill_bytes"] for row in decode)


def test_the_decode_kernel_is_short():
    check_decode(reduced("sm_90"))


def test_the_decode_kernel_is_short_in_another_triton():
    if not OTHER_TRITON.exists():
        pytest.skip(f"no {OTHER_TRITON.relative_to(ROOT)}: make installs it")
    done = report("--triton", str(OTHER_TRITON), "--kernel", "sparse_decode", "--target", "sm_90")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["triton"] for row in rows} == {"3.6.0"}
    assert {row["triton"] for row in reduced("sm_90")} == {triton.__version__}
    check_decode(rows)


@pytest.mark.parametrize("version", sorted({"3.6.0", "3.7.1", "3.8.0", triton.__version__}))
def test_the_cost_model_has_todays_costs(version):
    """Else: python benchmarks/decode_model.py costs."""
    folder = ROOT / ".cache" / f"triton-{version}"
    if version != triton.__version__ and not folder.exists():
        pytest.skip(f"no {folder.relative_to(ROOT)}, and it is not the installed version")
    options = [] if version == triton.__version__ else ["--triton", str(folder)]
    done = python(
        BENCHMARKS / "kernel_report.py", "--decode-costs", *options, environment=compiling()
    )
    assert done.returncode == 0, done.stderr
    known = json.loads((BENCHMARKS / "results" / "decode-costs.json").read_text())
    assert json.loads(done.stdout) == {version: known[version]}


def test_a_folder_without_triton_is_refused(tmp_path):
    done = report("--triton", str(tmp_path))
    assert done.returncode == 1
    assert "pip install" in done.stderr


@each_target
def test_every_kernel_is_reported(target):
    launched = set()
    for path in (ROOT / "triton_kernels").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        kernels = {
            node.name
            for node in nodes
            if isinstance(node, ast.FunctionDef)
            and any("triton.jit" in ast.unparse(line) for line in node.decorator_list)
        }
        launches = {
            node.func.value.id
            for node in nodes
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)  # kernel[grid](...)
            and isinstance(node.func.value, ast.Name)
        }
        launched |= {f"{path.stem}.{name}" for name in kernels & launches}
    assert len(launched) >= 6
    assert launched == {row["kernel"] for row in reduced(target)}


@pytest.mark.slow
def test_compiled_kernels_are_kept_on_disk(tmp_path):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}

    options = ("--kernel", "correct_slots", "--target", "sm_90")
    first = report(*options, TRITON_CACHE_DIR=str(tmp_path))
    compiled = files()
    second = report(*options, TRITON_CACHE_DIR=str(tmp_path))
    assert any(path.suffix == ".cubin" for path in compiled)
    assert files() == compiled
    assert first.stdout == second.stdout


def test_an_interpreted_run_is_refused():
    done = report(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@triton.jit
def _sum(x_ptr, out_ptr, n, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of `n` rows of `BLOCK` numbers, `STRIDE` apart."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(n):
        total += tl.load(x_ptr + row * BLOCK * STRIDE + column * STRIDE)
    tl.store(out_ptr + column, total)


@triton.jit
def _product(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Product of `n` matrices, whose tiles wait in shared memory."""
    index = tl.arange(0, BLOCK)
    at = index[:, None] * BLOCK + index[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for row in tl.range(n, num_stages=8):
        x = tl.load(x_ptr + row * BLOCK * BLOCK + at)
        total = tl.dot(x, x, total)
    tl.store(out_ptr + at, total.to(tl.bfloat16))


def probe(arch: int) -> None:
    """Print the rows of kernels that are known to be good or bad, and what is wrong with each."""
    x = torch.empty(64)
    half = x.to(torch.bfloat16)
    launches = {
        "wide": lambda: _sum[(1,)](x, x, 7, STRIDE=1, BLOCK=4096),
        "narrow": lambda: _sum[(1,)](x, x, 7, STRIDE=3, BLOCK=4096),
        # 32 sums in each thread of 32 registers.
        "spill": lambda: _sum[(1,)](x, x, 7, STRIDE=1, BLOCK=4096, maxnreg=32),
        # 8 tiles of 32 KiB.
        "shared": lambda: _product[(1,)](half, half, 7, BLOCK=128),
    }
    rows = {name: kernel_report.compiled(launch, arch)[0] for name, launch in launches.items()}
    if arch < 89:  # Triton has no e4m3 there
        case = kernel_report.Case("window_scores", arch, "fp8", 64, 16, 1)
        (rows["error"],) = kernel_report.rows_of(case)
    found = {
        name: [row, kernel_report.failures([row | {"target": f"sm_{arch}"}])]
        for name, row in rows.items()
    }
    print(json.dumps(found))


@pytest.mark.parametrize(
    "arch", [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (90, 100))]
)
def test_the_report_sees_what_is_wrong(arch):
    done = python(__file__, str(arch), environment=compiling())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    wide, failures = found["wide"]
    assert not failures
    assert wide["spill_bytes"] == 0
    assert (wide["widest_load"], wide["widest_store"]) == (128, 128)
    assert (wide["wide_loads"], wide["wide_loop_loads"]) == (1, 1)
    assert wide["loop_instructions"] is None, "no tensor cores"
    registers = -(-wide["registers"] // 8) * 8 * 32 * wide["num_warps"]
    assert wide["programs"] == 65536 // registers < 16, "registers are fewer than threads"

    narrow, failures = found["narrow"]
    assert not failures
    assert (narrow["widest_load"], narrow["widest_store"]) == (32, 128)
    assert (narrow["wide_loads"], narrow["wide_loop_loads"]) == (0, 0)

    spill, failures = found["spill"]
    assert spill["spill_bytes"] > 0
    assert spill["registers"] <= 32
    assert spill["programs"] == 2048 // (32 * spill["num_warps"]), "all threads"
    assert failures == [f"__main__._sum target=sm_{arch}: spills {spill['spill_bytes']} bytes"]

    shared, (failure,) = found["shared"]
    assert f"needs {shared['shared_bytes']} bytes of shared memory" in failure
    assert shared["programs"] == 0
    if arch < 100:  # there, products of this size are another unit's
        assert shared["loop_instructions"] > 100
        assert shared["loop_cycles"] > shared["loop_instructions"]

    assert ("error" in found) == (arch < 89)
    if arch < 89:
        row, (failure,) = found["error"]
        assert row["kernel"] in failure
        assert "fp8e4nv" in failure


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_the_full_matrix():
    done = report("--full")
    assert done.returncode == 0, done.stderr[-10000:]
    rows = json.loads(done.stdout)
    assert all(row["widest_load"] >= 128 for row in rows if row["kernel"] not in NARROW)


if __name__ == "__main__":
    probe(int(sys.argv[1]))
