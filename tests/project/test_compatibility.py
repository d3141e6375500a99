"""The table of versions, and the bounds that follow it."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import compatibility
import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from report import with_tables

from sparsemm_vllm.engine.vllm_api import contract
from support.paths import ROOT

VERSIONS = {"vllm": "0.33.0", "torch": "2.14.0", "triton": "3.8.0", "transformers": "5.20.2",
            "python": "3.11.7"}  # fmt: skip
JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite
 name="pytest" errors="1" failures="2" skipped="30" tests="1033" time="612.4"
 timestamp="2026-11-28T09:00:01.1+00:00"><testcase name="a"/></testsuite></testsuites>"""


def check(*statuses: str, **versions: str) -> dict[str, Any]:
    """What `sparsemm check --run --json` writes."""
    rows = [{"name": f"row {i}", "status": status} for i, status in enumerate(statuses)]
    return {
        "versions": {"sparsemm-vllm": "0.1.0", **VERSIONS, **versions},
        "device": "CPU",
        "date": "2026-11-27",
        "seconds": 51.3,
        "rows": rows,
        "passed": set(statuses) == {"ok"},
    }


@pytest.fixture
def junit(tmp_path: Path) -> Path:
    file = tmp_path / "tests.xml"
    file.write_text(JUNIT)
    return file


def test_tests_are_counted_by_outcome(junit: Path) -> None:
    assert compatibility.count_tests(junit) == {
        "passed": 1000,
        "failed": 3,
        "skipped": 30,
        "seconds": 612,
        "date": "2026-11-28",
    }


def test_a_record_of_each_environment(tmp_path: Path, junit: Path) -> None:
    records = tmp_path / "compatibility"
    tests = compatibility.count_tests(junit)
    first = compatibility.keep(check("ok", "ok"), tests, "abc", records)
    assert first.name == "vllm-0.33.0-python-3.11-cpu.json"
    again = compatibility.keep(check("ok", "differs"), None, "def+", records)
    assert again == first
    found = json.loads(first.read_text())
    assert found["check"]["wrong"] == ["row 1"]
    assert found["check"]["commit"] == "def+"
    assert found["tests"]["commit"] == "abc", "of these versions, and still true"
    compatibility.keep(check("ok", triton="3.8.1"), None, "ghi", records)
    assert "tests" not in json.loads(first.read_text()), "of other versions"
    compatibility.keep(check("ok", python="3.13.0"), None, "ghi", records)
    assert len(list(records.iterdir())) == 2


def test_the_table(tmp_path: Path, junit: Path) -> None:
    records, tests = tmp_path / "compatibility", compatibility.count_tests(junit)
    compatibility.keep(check("ok", "differs"), tests, "abc", records)
    compatibility.keep(check("ok", vllm="0.32.0", triton="3.7.1"), None, "abc", records)
    gpu = tmp_path / "nvidia-h200" / "2026-11-26"
    gpu.mkdir(parents=True)
    machine = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"}
    for part, vllm, done, total in (("kernels", None, 4, 5), ("modes", "0.32.0", 1, 8)):
        cases = dict.fromkeys(map(str, range(done)))
        machines = [machine | {"vllm": vllm}]  # kernels run without vLLM
        document = {"dry_run": False, "machines": machines, "cases": cases, "total": total}
        (gpu / f"{part}.json").write_text(json.dumps(document))
    _, _, newest, card, older = compatibility.lines(tmp_path)
    assert newest == (
        "| 0.33.0 | 2.14.0 | 3.8.0 | 5.20.2 | 3.11.7 | CPU | 1 of 2 passed, 51 s | "
        "1,000 passed, 3 failed, 30 skipped | 2026-11-28 |"
    )
    assert older.startswith("| 0.32.0 | 2.14.0 | 3.7.1 |")
    assert card == (
        "| 0.32.0 | 2.11.0 | 3.6.0 | - | - | NVIDIA H200 | - | "
        "4 of 5 kernel cases right, 1 of 8 engine modes | 2026-11-26 |"
    )


def test_the_page_is_up_to_date() -> None:
    text = compatibility.PAGE.read_text()
    written = with_tables(text, {"compatibility": compatibility.lines}, "compatibility.py")
    assert written == text, "run benchmarks/compatibility.py table"


# What pyproject.toml asks for


def records() -> list[dict[str, Any]]:
    """Records of environments in which the check passed."""
    found = [json.loads(file.read_text()) for file in compatibility.RECORDS.glob("*.json")]
    return [record for record in found if not record["check"]["wrong"]]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_supported_vllm_was_run_whole() -> None:
    """Check and tests, none failed, on the very release whose signatures were recorded."""
    whole = {
        r["versions"]["vllm"] for r in records() if r.get("tests", {"failed": 1})["failed"] == 0
    }
    assert whole == {known.vllm for known in contract.recorded()}
    (bound,) = (line for line in PROJECT["dependencies"] if line.startswith("vllm"))
    supported = SpecifierSet(bound.removeprefix("vllm"))
    assert all(version in supported for version in whole)
    newest = max(map(Version, whole))
    assert f"{newest.major}.{newest.minor + 1}.0" not in supported


def test_every_python_was_run() -> None:
    minors = {Version(r["versions"]["python"]).minor for r in records()}
    asked = SpecifierSet(PROJECT["requires-python"])
    allowed = {minor for minor in range(20) if f"3.{minor}.0" in asked}
    assert minors == allowed


def test_every_release_has_constraints_and_ci_runs_it() -> None:
    makefile = (ROOT / "Makefile").read_text()
    latest = re.search(r"^LATEST := (.+)$", makefile, re.M)
    assert latest is not None
    releases = [".".join(known.vllm.split(".")[:2]) for known in contract.recorded()]
    assert releases[-1] == latest[1]
    ci = (ROOT / ".ci" / "run").read_text()
    for known, release in zip(contract.recorded(), releases, strict=True):
        suffix = "" if release == latest[1] else f"-{release}"
        constraints = (ROOT / f"constraints{suffix}.txt").read_text()
        assert f"\nvllm=={known.vllm}\n" in constraints
        assert "\ntorch===" in constraints
        assert "make test\n" in ci if not suffix else f"make reduced VLLM={release}\n" in ci
