"""The GPU suite runs on the CPU, resumes, and says so when something fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsemm_vllm import environment
from sparsemm_vllm.environment import CPU_VARIABLES
from support.gpu_copies import copy, has_ended
from support.paths import ROOT

TIME_IS_OVER = 3  # exit status
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in CPU_VARIABLES}  # it sets its own

STUB = """
import os, time
NEEDS = 1

def cases(context):
    flag = context.folder / "repaired"
    def bad():
        assert flag.exists(), "it is broken"
        return {}
    def dies():
        if not flag.exists():
            os._exit(9)
        return {}
    return {"first": lambda: {"value": 1}, "bad": bad, "dies": dies, "last": lambda: {"value": 2}}
"""

# All of the serving side, and the benchmarks that are run there.
IMPORT_WHAT_RUNS_THERE = """
import importlib, pathlib, sys
from gpu_parts.device import ABSENT

sys.modules |= dict.fromkeys(ABSENT)
rooms = 'sparsemm_vllm/budget', 'sparsemm_vllm/engine', 'triton_kernels'
files = [*pathlib.Path('sparsemm_vllm').glob('*.py')]
files += [file for room in rooms for file in pathlib.Path(room).rglob('*.py')]
for file in files:
    if file.stem != 'cli':
        importlib.import_module('.'.join(file.with_suffix('').parts))
print(len(files))
import decode_latency, prefill_cost, serving
"""


def suite(
    out: Path, *arguments: str, root: Path = ROOT, dry: bool = True
) -> subprocess.CompletedProcess[str]:
    script = root / "benchmarks" / "gpu_suite.py"
    command = [sys.executable, str(script), "--out", str(out), *arguments]
    command += ["--dry-run"] if dry else []
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=800)


def last_line(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def check(out: Path, done: subprocess.CompletedProcess[str], parts: set[str]) -> None:
    """All parts are done, every case has a result, and what was measured on is on record."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    overview = last_line(done)
    assert overview["ok"]
    assert set(overview["parts"]) == parts
    for part in parts:
        record = json.loads((out / f"{part}.json").read_text())
        assert record["total"] == len(record["cases"]) > 1
        assert not record["failed"]
        assert record["seconds"] > 0
        assert {"device", "driver", "torch", "triton", "vllm", "commit"} <= set(record["machine"])
        assert not (out / f"{part}.partial.json").exists()


def test_the_gpu_machine_needs_vllm_only() -> None:
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    command = [sys.executable, "-c", IMPORT_WHAT_RUNS_THERE]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60, "modules are elsewhere"


@pytest.mark.slow
def test_dry_run_of_all_kernels(tmp_path: Path) -> None:
    check(tmp_path, suite(tmp_path, "--parts", "kernels,tune"), {"kernels", "tune"})
    kernels = json.loads((tmp_path / "kernels.json").read_text())["cases"]
    for case in kernels.values():
        assert 0 < case["errors"]["sparse_decode"] <= case["tolerance"]
    assert any(name.startswith("graph") for name in kernels)
    tune = json.loads((tmp_path / "tune.json").read_text())["cases"]
    assert all(case["bytes_per_second"] > 0 for case in tune.values())


@pytest.mark.slow
def test_dry_run_of_methods(tmp_path: Path) -> None:
    check(tmp_path, suite(tmp_path, "--parts", "methods"), {"methods"})


def test_dry_run(tmp_path: Path) -> None:
    parts = ("bench",)
    check(tmp_path, suite(tmp_path, "--parts", ",".join(parts)), set(parts))

    bench = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert bench["copy bandwidth"]["bytes_per_second"] > 0
    read = bench["read bandwidth"]["bytes_per_second"]
    decodes = [case for name, case in bench.items() if name.startswith("decode")]
    for case in decodes:
        assert case["balance"] >= 1
        assert case["most_items"] >= 1
        assert case["predicted_us"] == pytest.approx(1e6 * case["kept_bytes"] / read)
    assert {case["layout"] for case in decodes} == {"LBHNC", "LBNHC"}
    assert {case["dtype"] for case in decodes} == {"float32", "float8_e4m3fn"}
    (trace,) = (case for name, case in bench.items() if name.startswith("trace"))
    same = bench["decode tiny B=64 batch=2 n=200"]
    assert sum(layer["bytes"] for layer in trace["layers"]) / 3 == same["kept_bytes"]
    assert all(layer["us"] > 0 and layer["most_items"] >= 1 for layer in trace["layers"])
    assert max(layer["most_items"] for layer in trace["layers"]) == same["most_items"]
    assert any("flash" in case for case in decodes)
    assert any("share_of_prefill" in case for case in bench.values())

    before = {part: (tmp_path / f"{part}.json").read_text() for part in parts}
    start = time.monotonic()
    check(tmp_path, suite(tmp_path, "--parts", ",".join(parts)), set(parts))
    assert time.monotonic() - start < 30, "nothing was left to do"
    assert before == {part: (tmp_path / f"{part}.json").read_text() for part in parts}


@pytest.mark.slow
def test_dry_run_of_engines(tmp_path: Path) -> None:
    check(tmp_path, suite(tmp_path, "--parts", "modes,pair"), {"modes", "pair"})
    modes = json.loads((tmp_path / "modes.json").read_text())["cases"]
    assert modes["float32 full"]["compared"] == modes["float32 full"]["of"]
    pair = json.loads((tmp_path / "pair.json").read_text())["cases"]
    assert pair["budget over prompt"]["compared"] == pair["budget over prompt"]["of"]
    assert pair["pruned"]["rounds"][-1]["tokens_per_second"] > 0
    tokens = [a["tokens"] for r in pair["dense"]["rounds"] for a in r["answers"]]
    assert len({tuple(t) for t in tokens}) == len(tokens), "the model says something"


def test_a_wrong_kernel_fails(tmp_path: Path) -> None:
    root = copy(tmp_path / "copy")
    kernel = root / "triton_kernels" / "compact_kv.py"
    text = kernel.read_text()
    assert "token < length\n" in text
    kernel.write_text(text.replace("token < length\n", "token < length - 1\n"))
    parts = root / "benchmarks" / "gpu_parts" / "kernels.py"
    text = parts.read_text()
    start = text.index("DRY_AXES = ")
    few = 'DRY_AXES = {k: v[:1] for k, v in AXES.items()} | {"dtype": ("fp32", "bf16"), "D": (32,)}'
    parts.write_text(text[:start] + few + text[text.index("\n", start) :])

    out = tmp_path / "out"
    done = suite(out, "--parts", "kernels", "--cases", "^(dtype|graph)", root=root)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    overview = last_line(done)
    assert not overview["ok"]
    assert overview["parts"]["kernels"]["status"] == "failed"
    assert "compact_kv: not the same bytes" in (out / "kernels.failed.txt").read_text()
    assert not (out / "kernels.json").exists()


def test_failures_are_repeated(tmp_path: Path) -> None:
    """A case that raises and one that kills its process do not keep the others from running."""
    root, out = copy(tmp_path / "copy"), tmp_path / "out"
    (root / "benchmarks" / "gpu_parts" / "tune.py").write_text(STUB)
    done = suite(out, "--parts", "tune", root=root)
    assert done.returncode == 1, done.stderr
    (own,) = last_line(done)["parts"].values()
    assert (own["cases"], own["total"], own["failed"]) == (2, 4, ["bad", "dies"])
    failures = (out / "tune.failed.txt").read_text()
    assert "it is broken" in failures
    assert "status 9" in failures
    first = json.loads((out / "tune.partial.json").read_text())["cases"]["first"]

    (out / "repaired").touch()
    done = suite(out, "--parts", "tune", root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "tune.json").read_text())["cases"]["first"] == first, "kept"
    assert not (out / "tune.failed.txt").exists()


def test_a_case_that_hangs_is_stopped(tmp_path: Path) -> None:
    root, out = copy(tmp_path / "copy"), tmp_path / "out"
    script = root / "benchmarks" / "gpu_suite.py"
    script.write_text(script.read_text().replace("GRACE = 30", "GRACE = 1"))
    stub = root / "benchmarks" / "gpu_parts" / "tune.py"
    stub.write_text(STUB.replace("os._exit(9)", "time.sleep(600)"))
    done = suite(out, "--parts", "tune", "--minutes", "0.25", root=root)
    assert done.returncode == 1, done.stdout + done.stderr
    (own,) = last_line(done)["parts"].values()
    assert (own["cases"], own["failed"]) == (1, ["bad", "dies"])
    assert "stopped 1 seconds after the end" in (out / "tune.failed.txt").read_text()


def test_time_is_over(tmp_path: Path) -> None:
    """A call does at least one case, and no more than it has the time for."""
    root, out = copy(tmp_path / "copy"), tmp_path / "out"
    stub = root / "benchmarks" / "gpu_parts" / "tune.py"
    stub.write_text(STUB.replace("NEEDS = 1", "NEEDS = 1000"))
    out.mkdir()
    (out / "repaired").touch()
    for count in (1, 2):
        done = suite(out, "--parts", "tune", "--minutes", "0.5", root=root)
        assert done.returncode == 3, done.stdout + done.stderr
        (own,) = last_line(done)["parts"].values()
        assert (own["status"], own["cases"]) == ("unfinished", count)


def test_cases_by_name(tmp_path: Path) -> None:
    """Only those run; what failed among the others is still told."""
    root, out = copy(tmp_path / "copy"), tmp_path / "out"
    (root / "benchmarks" / "gpu_parts" / "tune.py").write_text(STUB)
    done = suite(out, "--parts", "tune", "--cases", "^bad", "--quiet", root=root)
    assert done.returncode == 1, done.stderr
    done = suite(out, "--parts", "tune", "--cases", "first|last", "--at-once", "2", root=root)
    assert done.returncode == 1, done.stderr
    record = json.loads((out / "tune.partial.json").read_text())
    assert record["names"] == ["first", "bad", "dies", "last"]
    assert set(record["cases"]) == {"first", "last"}
    assert list(record["failed"]) == ["bad"]
    (out / "repaired").touch()
    done = suite(out, "--parts", "tune", "--cases", "^bad", "--quiet", root=root)
    assert done.returncode == 0, done.stderr
    assert "====" not in done.stdout
    done = suite(out, "--report", root=root)
    assert last_line(done)["parts"]["tune"]["cases"] == 3
    assert done.returncode == TIME_IS_OVER, "one case is left"


def test_asked_to_end_a_part_ends_too(tmp_path: Path) -> None:
    """What it found so far is on disk, and none of its processes runs on."""
    root, out = copy(tmp_path / "copy"), tmp_path / "out"
    stub = STUB.replace("os._exit(9)", "(context.folder / 'pid').write_text(str(os.getpid()))")
    stub = stub.replace("return {}\n    return", "time.sleep(600)\n    return")
    (root / "benchmarks" / "gpu_parts" / "tune.py").write_text(stub)
    command = [sys.executable, str(root / "benchmarks" / "gpu_suite.py"), "--dry-run"]
    process = subprocess.Popen([*command, "--out", str(out), "--parts", "tune"], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while not (out / "pid").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == TIME_IS_OVER
    finally:
        process.kill()
    assert has_ended(int((out / "pid").read_text()))
    record = json.loads((out / "tune.partial.json").read_text())
    assert list(record["cases"]) == ["first"]
    assert record["running"] == ["dies"]


def test_dry_and_real_results_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text('{"dry_run": false}')
    done = suite(tmp_path, "--parts", "tune")
    assert done.returncode == 1
    assert "give another --out" in done.stderr


def test_unknown_part(tmp_path: Path) -> None:
    done = suite(tmp_path, "--parts", "kernel")
    assert done.returncode == 2
    assert "unknown parts: kernel; known: kernels, methods, " in done.stderr


@pytest.mark.gpu
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not environment.has_gpu(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", ["kernels", "methods", "modes", "pair"])
def test_on_a_gpu(part: str, tmp_path: Path) -> None:
    """Kernels equal twins, graph modes one another; a 7B that keeps all is dense."""
    for _ in range(4):  # a call ends after seven minutes, done or not
        done = suite(tmp_path, "--parts", part, dry=False)
        if done.returncode != TIME_IS_OVER:
            break
    assert done.returncode == 0, done.stdout + done.stderr
