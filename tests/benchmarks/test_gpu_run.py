"""The two commands for a GPU machine: their plans, what a killed job leaves, what is printed."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_plans
import gpu_run
import pytest
from gpu_run import CHARACTERS, Job, Places, Run, clip

from sparsemm_vllm.environment import CPU_VARIABLES
from support.gpu_copies import copy, has_ended
from support.paths import ROOT

PYTHON = sys.executable
TIMED = {"timings", "tune", "prunes", "ncu", "pair dense", "pair pruned", "pair fp8"}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """Empty folders, and a cache of Triton of their own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    places = Places(tmp_path / "out", tmp_path / "work", tmp_path / "bundle")
    places.out.mkdir()
    places.work.mkdir()
    return places


def script(name: str, text: str, until: float = 60, **options: object) -> Job:
    """A job that runs a few lines of Python."""
    return Job(name, (PYTHON, "-c", text), until, **options)  # type: ignore[arg-type]


def run(places: Places, *jobs: Job) -> Run:
    """Run jobs to their end."""
    whole = Run(list(jobs), places, dry=False, seconds=60)
    whole.go()
    return whole


def in_tar(places: Places) -> dict[str, bytes]:
    """Files of the tar by name."""
    with tarfile.open(places.tar) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}


def kernels_record(places: Places, passed: bool) -> str:
    """Python that writes the record of a first look."""
    cases = {"smoke first": {}} if passed else {"smoke second": {}}
    record = {"names": ["smoke first", "smoke second", "rest"], "cases": cases}
    return f"open({str(places.work / 'kernels.partial.json')!r}, 'w').write({json.dumps(record)!r})"


def test_a_killed_job_leaves_its_results(places: Places) -> None:
    """What it wrote before its deadline is in the tar, its children end, and the next one runs."""
    record, child = places.work / "bench.partial.json", places.work / "child.txt"
    hangs = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(record)!r}).write_text('{{"cases": {{"first": 1}}}}')
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(child)!r}).write_text(str(child.pid))
print("said", flush=True)
time.sleep(600)
"""
    begin = time.monotonic()
    jobs = script("hangs", hangs, until=2), script("next", "print(1)", after=("hangs",))
    whole = run(places, *jobs)
    assert time.monotonic() - begin < 20
    assert whole.ended == {"hangs": "killed after 2 s", "next": "ok"}
    found = in_tar(places)
    assert json.loads(found["bench.partial.json"]) == {"cases": {"first": 1}}
    assert found["logs/hangs.log"] == b"said\n"
    assert json.loads(found["jobs.json"])["jobs"]["next"]["status"] == "ok"
    assert has_ended(int(child.read_text()))


def test_the_tar_is_whole_after_each_job(places: Places) -> None:
    """A command that is killed between two jobs has the first one's results."""
    first = script("first", f"open({str(places.work / 'first.json')!r}, 'w').write('[1]')")
    look = (
        "import tarfile; found = tarfile.open("
        f"{str(places.tar)!r}).getnames(); assert 'first.json' in found, found"
    )
    whole = run(places, first, script("second", look, after=("first",)))
    assert whole.ended == {"first": "ok", "second": "ok"}
    assert sorted(path.name for path in places.out.iterdir()) == ["results.tar.gz"]


def test_the_tar_has_room_for_records_before_kernels(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's cache is left out where the tar would be too large; so is what came with it."""
    for key in ("AAAA", "BBBB"):
        folder = tmp_path / "triton" / key
        folder.mkdir(parents=True)
        (folder / "kernel.cubin").write_bytes(os.urandom(3 << 20))
    (places.work / "kernels.json").write_text("{}")
    monkeypatch.setattr(gpu_run, "PACKED_BYTES", 1 << 20)
    gpu_run.pack(places)
    assert set(in_tar(places)) == {"kernels.json", "triton/AAAA/kernel.cubin", "left-out.txt"}
    monkeypatch.setattr(gpu_run, "PACKED_BYTES", 9 << 20)
    monkeypatch.setattr(gpu_run, "archived_kernels", lambda archive: {"AAAA"})
    gpu_run.pack(places)
    assert set(in_tar(places)) == {"kernels.json", "triton/BBBB/kernel.cubin"}


def test_a_first_case_that_fails_leads_to_the_sanitizer(places: Places) -> None:
    """Nothing else is begun, and it looks at that case only."""
    seen = places.work / "seen.txt"
    plan = [
        script("smoke", kernels_record(places, passed=False) + "; raise SystemExit(1)"),
        Job(
            "sanitizer",
            (
                PYTHON,
                "-c",
                f"import sys; open({str(seen)!r}, 'w').write(sys.argv[1])",
                gpu_run.FIRST_CASE,
            ),
            60,
            after=("smoke",),
            if_broken=True,
        ),
        script("timings", "print()", after=("smoke",)),
    ]
    whole = run(places, *plan)
    assert whole.ended == {
        "smoke": "ended with status 1",
        "timings": "skipped: the kernels' first case failed",
        "sanitizer": "ok",
    }
    assert seen.read_text() == "^smoke\\ first$"


def test_another_case_that_fails_stops_nothing(places: Places) -> None:
    plan = [
        script("smoke", kernels_record(places, passed=True) + "; raise SystemExit(1)"),
        script("sanitizer", "print()", after=("smoke",), if_broken=True),
        script("timings", "print()", after=("smoke",)),
    ]
    ended = run(places, *plan).ended
    assert ended["sanitizer"] == "skipped: the first case passed"
    assert ended["timings"] == "ok"


def test_what_needs_a_failed_job_is_skipped(places: Places) -> None:
    plan = [
        script("bundle", "raise SystemExit(2)"),
        script("engines", "print()", needs=("bundle",)),
        script("timings", "print()", after=("engines",)),
        Job("ncu", ("no-such-command",), 60),
    ]
    assert run(places, *plan).ended == {
        "bundle": "ended with status 2",
        "engines": "skipped: bundle ended with status 2",
        "timings": "ok",
        "ncu": "skipped: there is no no-such-command",
    }


@pytest.mark.parametrize("name", list(gpu_run.RUNS))
def test_timed_jobs_are_alone(name: str, places: Places) -> None:
    """Every job that is timed begins after all before it and ends before all behind it."""
    plan, seconds = gpu_run.RUNS[name]
    jobs = {job.name: job for job in plan(places, False)}
    before: dict[str, set[str]] = {}
    for job in jobs.values():
        direct = {*job.after, *job.needs}
        assert direct <= set(before), f"{job.name} waits for a job behind it"
        before[job.name] = direct.union(*(before[other] for other in direct))
        assert job.until <= seconds - gpu_run.REPORT_SECONDS
    for job in TIMED & set(jobs):
        for other in set(jobs) - {job, "sanitizer"}:
            assert other in before[job] or job in before[other], f"{other} runs beside {job}"
    assert before["sanitizer"] == {"cache", "smoke"}


def test_some_jobs_keep_their_order(places: Places) -> None:
    """Through those that are left out, too."""
    plan = gpu_plans.first_run(places, False)
    smoke, timings = gpu_plans.some_jobs(plan, {"timings", "smoke"})
    assert (smoke.name, smoke.after) == ("smoke", ())
    assert (timings.name, timings.after, timings.needs) == ("timings", ("smoke",), ())


def test_the_output_is_short(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Run([], places, dry=True, seconds=60)
    for i in range(50):
        whole.say(f"{i} " + 100 * "x")
    assert whole.printed == len(capsys.readouterr().out)
    lines = [f"line {i}" for i in range(10_000)]
    text = clip(lines, CHARACTERS - whole.printed)
    assert whole.printed + len(text) < CHARACTERS + 100
    assert text.startswith("line 0\n")
    assert text.splitlines()[-1].endswith(" more lines: --report")
    assert clip(["a", "b"], 100) == "a\nb"


def test_what_travels_is_not_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parts, the scripts, the commit and the cache, beside the tree."""
    bundle, gpu = tmp_path / "bundle", tmp_path / "gpu"
    bundle.mkdir()
    for name in ("bundle.part00", "bundle.sha256", "install_bundle.sh", "check_gpu.py"):
        (bundle / name).write_bytes(1000 * b"x")
    stub = tmp_path / "here"
    stub.mkdir()
    build = (
        f"import pathlib, sys; pathlib.Path({str(gpu)!r}, 'cache').write_text(str(sys.argv[1:]))"
    )
    (stub / "precompile.py").write_text(build)
    monkeypatch.setattr(gpu_run, "GPU", gpu)
    monkeypatch.setattr(gpu_run, "HERE", stub)
    gpu.mkdir()
    (gpu / "bundle.part07").touch()  # of an earlier bundle
    assert gpu_run.prepare(bundle, [Path("wheel")], [Path("tar")]) == 0
    assert {path.name for path in gpu.iterdir()} == {
        *(path.name for path in bundle.iterdir()),
        "commit",
        "cache",
    }
    assert (gpu / "cache").read_text() == "['build', '--triton', 'wheel', '--add', 'tar']"
    assert len(json.loads((gpu / "commit").read_text())["commit"]) == 40
    (bundle / "bundle.part01").write_bytes(bytes(60 << 20))
    assert gpu_run.prepare(bundle, [], []) == 1
    assert "too much" in capsys.readouterr().out


def dry_run(
    name: str, out: Path, *arguments: str, root: Path = ROOT, path: str = ""
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in CPU_VARIABLES}
    environment |= {"PYTHON": PYTHON, "TRITON_CACHE_DIR": str(out / "triton"), "OUT": str(out)}
    environment["PATH"] = path + environment["PATH"]
    command = ["sh", str(root / "benchmarks" / "gpu_run.sh"), name, "--dry-run", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)


def check_dry_run(out: Path, done: subprocess.CompletedProcess[str], parts: set[str]) -> None:
    """Every job ended well, and the tar has records with what was measured on."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert 500 < len(done.stdout) < CHARACTERS
    with tarfile.open(out / "results.tar.gz") as tar:
        names = set(tar.getnames())
        for part in parts:
            name = f"{part}.json" if f"{part}.json" in names else f"{part}.partial.json"
            record = json.load(tar.extractfile(name))
            assert record["cases"]
            assert not record["failed"]
            assert record["machine"]["commit"]
        facts = json.load(tar.extractfile("facts.json"))
        jobs = json.load(tar.extractfile("jobs.json"))["jobs"]
    assert len(facts["libtriton"]) == 64
    assert "release" in facts["ptxas"]
    statuses = {job["status"] for job in jobs.values()}
    assert statuses <= {"ok", "skipped: the first case passed"}


def test_dry_run_of_the_timings(tmp_path: Path) -> None:
    """The first run's jobs that need neither an engine nor minutes."""
    done = dry_run("1", tmp_path, "--jobs", "facts,cache,smoke,sanitizer,timings,tune,ncu")
    check_dry_run(tmp_path, done, {"kernels", "bench", "tune", "ncu"})
    for line in ("cache: ok", "decode tiny dense batch=2", "read bandwidth", "trace of tiny"):
        assert line in done.stdout


def test_a_wrong_kernel_is_sanitized(tmp_path: Path) -> None:
    """The whole command, with a kernel that forgets a token and a stand-in for the sanitizer."""
    root = copy(tmp_path / "copy")
    kernel = root / "triton_kernels" / "compact_kv.py"
    text = kernel.read_text()
    assert "token < length\n" in text
    kernel.write_text(text.replace("token < length\n", "token < length - 1\n"))
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "========= LOOKING"\nshift 4\nexec "$@"\n')
    tool.chmod(0o755)
    out = tmp_path / "out"
    jobs = ("--jobs", "smoke,sanitizer,timings")
    done = dry_run("1", out, *jobs, root=root, path=f"{tool.parent}{os.pathsep}")
    assert done.returncode == 1, done.stderr
    assert "timings: skipped: the kernels' first case failed" in done.stdout
    assert "sanitizer: ========= LOOKING" in done.stdout
    assert "FAILED smoke dtype=fp32 D=32 P=16 G=1 Q=1 layout=LBHNC: AssertionError" in done.stdout
    with tarfile.open(out / "results.tar.gz") as tar:
        seen = json.load(tar.extractfile("sanitizer/kernels.partial.json"))
    assert list(seen["failed"]) == seen["names"][:1], "that case and no other"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("1", {"kernels", "methods", "bench", "modes", "tune", "ncu"}),
        ("2", {"kernels", "modes", "pair"}),
    ],
)
def test_dry_run(name: str, parts: set[str], tmp_path: Path) -> None:
    check_dry_run(tmp_path, dry_run(name, tmp_path), parts)
