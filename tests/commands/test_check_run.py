"""`sparsemm check --run`: it passes, it can fail, and its engine may do what it likes."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.cli import app
from sparsemm_vllm.commands.check import run_child, run_parent
from sparsemm_vllm.commands.check.cases import BUDGET, CASES, START, WINDOW, Case, names
from sparsemm_vllm.commands.check.engine import Engine
from sparsemm_vllm.commands.check.judge import TOLERANCES, References, judge
from sparsemm_vllm.commands.check.model import KV_HEADS, make_llava, skewed_profile
from sparsemm_vllm.commands.check.results import Line, Results, Row
from sparsemm_vllm.commands.check.run_parent import END, CheckRun, run_check
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.environment import has_gpu

SPARSEMM = Path(sys.executable).parent / "sparsemm"
EXACT = TOLERANCES["cpu", "float32"]
ROWS = len(CASES) + 2 if not has_gpu() else 2 * len(CASES) + 3

WRONG = "its process wrote what is no result"

# What children do beside importing: `report` writes rows that are ok.
PRELUDE = """
import os, sys, time
from pathlib import Path
from sparsemm_vllm.commands.check.cases import names
from sparsemm_vllm.commands.check.results import Line, Results, Row
results = Results(Path(sys.argv[2]))
expected = names(sys.argv[3].split(","))
def report(names):
    for name in names:
        results.run(name, lambda: Row(name="", status="ok", tokens=24, difference=1e-6))
"""


def run(
    script: str, record: Path | None = None, seconds: float = 60.0, different: int = 0
) -> tuple[int, str, list[Row]]:
    """The exit status, what was printed, and all rows of a run with another child."""
    rows: list[Row] = []

    class Kept(CheckRun):
        def follow(self, console: Console) -> list[Row]:
            rows.extend(super().follow(console))
            return rows

    console = Console(file=io.StringIO(), width=160)
    command = [sys.executable, "-c", PRELUDE + script]
    code = run_check(console, lambda: different, record, Kept(seconds, command))
    return code, console.file.getvalue(), rows  # type: ignore[attr-defined]


def log_of(output: str) -> Path:
    (line,) = (line for line in output.splitlines() if line.startswith("The whole log: "))
    return Path(line.removeprefix("The whole log: "))


def statuses(rows: list[Row]) -> list[str]:
    assert [row.name for row in rows if row.name != END] == names(
        ["bfloat16", "float32"] if has_gpu() else ["float32"]
    )
    return [row.status for row in rows]


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs and models of this file go where they are removed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_all_rows_ok(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    code, output, rows = run("report(expected)", record)
    assert code == 0, output
    assert statuses(rows) == ["ok"] * ROWS
    assert output.rstrip().endswith("pass")
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"], "no log, no model"
    document = json.loads(record.read_text())
    assert document["passed"] is True
    assert document["versions"]["vllm"] == version("vllm")
    assert document["versions"].keys() == {*run_parent.PACKAGES, "python"}
    assert [Row.model_validate(row) for row in document["rows"]] == rows
    assert document["device"]
    assert document["seconds"] > 0


def test_what_differs_in_vllm_counts_too() -> None:
    assert run("report(expected)", different=1)[0] == 1


def test_a_row_that_differs(tmp_path: Path) -> None:
    code, output, rows = run(
        "report(expected[:-1]);"
        "results.run(expected[-1], lambda: Row(name='', status='differs', finding='[b]token 3[/]'))"
        "",
        tmp_path / "record.json",
    )
    assert code == 1
    assert rows[-1].status == "differs"
    assert "[b]token 3[/]" in output
    assert f"1 of {ROWS} rows did not pass" in output
    assert json.loads((tmp_path / "record.json").read_text())["passed"] is False


def test_an_exception_is_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> Row:
        raise KeyError("get_computed_blocks\nand more")

    assert not Results(tmp_path / "results").run("some", work)
    begun, done = map(json.loads, (tmp_path / "results").read_text().splitlines())
    assert begun == {"begins": "some"}
    assert done["row"]["status"] == "failed"
    assert done["row"]["finding"].startswith("KeyError: 'get_computed_blocks")
    assert "(test_check_run.py, line " in done["row"]["finding"]
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("script", "finding"),
    [
        ("print('no such operator', flush=True); os._exit(3)", "its process ended with code 3"),
        ("os.kill(os.getpid(), 11)", "its process ended with code -11"),
        ("sys.exit()", "its process ended too early"),
        ("raise SystemExit('SPARSEMM: no GPU')", "its process ended with code 1"),
        (
            "results._file.write('rubbish\\n'); time.sleep(60)",
            WRONG,
        ),
        ("results._file.write('{\"row\": {}}\\n')", WRONG),
        ("report(['another'])", "its process wrote a result that nothing asked for: another"),
        ("report(expected[:1])", "its process wrote a result that nothing asked for"),
    ],
)
def test_a_child_that_fails(script: str, finding: str) -> None:
    """While the engine starts: what was reported stays, what follows was not run."""
    code, output, rows = run(f"report(expected[:1]); results.write(begins=expected[1])\n{script}")
    assert code == 1
    assert statuses(rows) == ["ok", "failed"] + ["not run"] * (ROWS - 2)
    assert rows[1].finding.startswith(finding)
    assert "Traceback" not in output
    log = log_of(output)
    assert log.exists()
    if "print" in script:
        assert "no such operator" in output
        assert "no such operator" in log.read_text()


def test_a_row_that_fails_ends_the_run() -> None:
    code, _, rows = run("report(expected[:2]); results.run(expected[2], lambda: 1 / 0)")
    assert code == 1
    assert statuses(rows) == ["ok", "ok", "failed"] + ["not run"] * (ROWS - 3)
    assert rows[2].finding == "ZeroDivisionError: division by zero (<string>, line 11)"


def test_a_child_that_never_reports() -> None:
    code, _, rows = run("os._exit(9)")
    assert code == 1
    assert statuses(rows) == ["failed"] + ["not run"] * (ROWS - 1)


def test_a_child_that_fails_after_the_last_row() -> None:
    code, _, rows = run("report(expected); os._exit(4)")
    assert code == 1
    assert rows[-1] == Row(name=END, status="failed", finding="its process ended with code 4")
    assert statuses(rows) == ["ok"] * ROWS + ["failed"]


def test_a_child_that_hangs(tmp_path: Path) -> None:
    """It and its own children are ended."""
    code, output, rows = run(
        "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)',"
        f" {str(tmp_path)!r}]); results.write(begins=expected[1]); time.sleep(99)",
        seconds=8.0 if not has_gpu() else 4.0,
    )
    assert code == 1
    assert statuses(rows)[:2] == ["not run", "failed"]
    assert rows[1].finding == "no end after 8 s"
    assert log_of(output).exists()
    left = [
        p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in (p.info["cmdline"] or [])
    ]
    assert not left


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, sign: signal.Signals) -> None:
    code, output, _ = run(f"os.kill(os.getppid(), {sign:d}); time.sleep(99)")
    assert code == 130
    assert "Interrupted" in output
    assert not list(tmp_path.iterdir())


def test_options(tmp_path: Path) -> None:
    alone = CliRunner().invoke(app, ["check", "--json", str(tmp_path / "record.json")])
    assert alone.exit_code == 2
    assert "--run" in alone.output
    nowhere = str(tmp_path / "none" / "record.json")
    done = CliRunner().invoke(app, ["check", "--run", "--json", nowhere])
    assert done.exit_code == 2
    assert f"sparsemm check: {nowhere}: No such file or directory" in done.output


# On a real engine: it passes as it is, and not with one piece broken.


@pytest.mark.engine
def test_this_vllm_passes(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = subprocess.run(
        [str(SPARSEMM), "check", "--run", "--json", str(record)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "symbols are as recorded of vLLM" in done.stdout
    assert done.stdout.rstrip().endswith("pass")
    rows = [Row.model_validate(row) for row in json.loads(record.read_text())["rows"]]
    assert statuses(rows) == ["ok"] * ROWS
    assert not list(tmp_path.glob("*check-*")), "no log, no model"


UNWRAPPED = """
from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.vllm_api import compatibility, hooks
from sparsemm_vllm.commands.check import run_child
del patches.WRAPPERS[hooks.COMPUTED_BLOCKS]
compatibility.IN_EVERY_PROCESS = tuple(patches.WRAPPERS)
compatibility.version = {"vllm": "0.99.0"}.__getitem__
run_child.main()
"""


@pytest.mark.engine
def test_an_engine_that_dies_at_the_first_request() -> None:
    """In a version that is not supported: it is served all the same."""
    code, output, rows = run(UNWRAPPED, seconds=240.0)
    assert code == 1
    by_name = {row.name: row for row in rows}
    first = next(row for row in rows if row.name.endswith(CASES[0].name))
    assert by_name[rows[1].name].status == "ok", f"{START}: {rows[1].finding}"
    assert (first.status, first.finding[:9]) == ("failed", "KeyError:")
    assert set(statuses(rows)[3:]) == {"not run"}
    assert "Traceback" in log_of(output).read_text()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, References]]:
    folder = tmp_path_factory.mktemp("served")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model = make_llava(folder / "model", layers=run_child.LAYERS)
    profile = skewed_profile(layers=run_child.LAYERS)
    layout = CacheLayout.from_scores(profile.tensor(), KV_HEADS, BUDGET, WINDOW)
    return run_child.open_engine(model, "float32"), References(model, layout)


def serve(served: tuple[Engine, References], name: str, folder: Path) -> Row:
    """A row, from an engine that had nothing in its prefix cache before."""
    engine, references = served
    cases: list[Case] = [case for case in CASES if case.name == name]
    if cases[0].keeps_cache:
        cases.insert(0, replace(cases[0], keeps_cache=False))

    def work() -> Row:
        for case in cases:
            answers, seen = run_child.serve(engine, case)
        return judge(case, answers, seen, references, EXACT)

    Results(folder / "rows").run(name, work)
    row = Line.model_validate_json((folder / "rows").read_text().splitlines()[-1]).row
    assert row is not None
    return row


@pytest.fixture(autouse=True)
def _whole_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """A broken engine may keep blocks; the next test finds none of them."""
    yield
    if "served" in request.fixturenames:
        engine, _ = request.getfixturevalue("served")
        core = engine.llm.llm_engine
        core.abort_request([f"request-{i}" for i in range(engine._asked)])
        core.step()


@pytest.mark.engine
def test_a_reference_with_another_budget(served: tuple[Engine, References], tmp_path: Path) -> None:
    engine, references = served
    scores = skewed_profile(layers=run_child.LAYERS).tensor()
    other = References.__new__(References)
    other.__dict__ = references.__dict__ | {
        "layout": CacheLayout.from_scores(scores, KV_HEADS, BUDGET, WINDOW, rho=0.5),
        "_known": {},
    }
    row = serve((engine, other), "pruned, whole", tmp_path)
    assert row.status == "differs"
    assert "log-probabilit" in row.finding or "likeliest" in row.finding


@pytest.mark.engine
@pytest.mark.parametrize("blocks", [1, -1])
def test_a_manager_that_frees_another_number_of_blocks(
    served: tuple[Engine, References], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, blocks: int
) -> None:
    register = SparseMMManager.register_prompt

    def miscount(self: SparseMMManager, request: Any) -> Any:
        prompt = register(self, request)
        prompt.freed_blocks += blocks
        return prompt

    monkeypatch.setattr(SparseMMManager, "register_prompt", miscount)
    row = serve(served, "pruned, whole", tmp_path)
    assert row.status == "differs"
    assert "blocks should be 9, 4, 5, 0" in row.finding


@pytest.mark.engine
def test_a_scheduler_that_shapes_no_chunks(
    served: tuple[Engine, References], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two tokens are left for the last chunk, and six of the window queries are gone."""
    from vllm.v1.core.sched.scheduler import Scheduler

    ours = Scheduler._reserve_prefill_lookahead
    monkeypatch.setattr(Scheduler, "_reserve_prefill_lookahead", ours.__wrapped__)
    row = serve(served, "pruned, in chunks", tmp_path)
    assert row.status == "failed"
    assert "holds 2 queries, fewer than the window of 8" in row.finding


@pytest.mark.engine
def test_a_prefix_hit_in_the_window(
    served: tuple[Engine, References], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(CacheLayout, "last_chunk", 2)
    row = serve(served, "pruned, prefix hit", tmp_path)
    assert row.status == "failed"
    assert "holds 2 queries, fewer than the window of 8" in row.finding


@pytest.mark.engine
def test_no_preemption(served: tuple[Engine, References], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is large enough proves nothing about preemption."""
    (case,) = (case for case in CASES if case.name == "preempted, resumed")
    answers, seen = run_child.serve(served[0], replace(case, requests=case.requests[:2]))
    row = judge(replace(case, requests=case.requests[:2]), answers, seen, served[1], EXACT)
    assert (row.status, row.finding) == (
        "differs",
        "not served as it should have been: not preempted",
    )
