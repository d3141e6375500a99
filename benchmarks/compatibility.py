"""Which versions SPARSEMM was run with, and with what result: docs/compatibility.md.

    python benchmarks/compatibility.py record               # runs `sparsemm check --run`, 1 minute
    python benchmarks/compatibility.py record --tests FILE  # and keeps what `make test` found
    python benchmarks/compatibility.py table                # writes the table anew

`record` adds what it saw to the record of this environment, one file for each vLLM, Python and
device in ``benchmarks/results/compatibility/``. FILE is JUnit XML, which `make record` lets pytest
write. What GPUs ran is read from ``benchmarks/results/<device>/<date>/``.
"""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, ROOT, code_version, markdown
from packaging.version import Version
from report import with_tables
from rich.console import Console

from sparsemm_vllm.files import write_json, write_whole

RECORDS = RESULTS / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = ("vllm", "torch", "triton", "transformers", "python")

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()


@app.command()
def record(
    tests: Annotated[Path | None, typer.Option(help="JUnit XML of a run of the tests.")] = None,
    records: Annotated[Path, typer.Option(help="Folder of all records.")] = RECORDS,
) -> None:
    """Run the check in this environment, and keep its result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "check.json"
        command = [str(Path(sys.executable).with_name("sparsemm")), "check", "--run"]
        subprocess.run([*command, "--json", str(file)])  # its status is in the file
        found = json.loads(file.read_text())
    code = code_version()
    commit = code["commit"][:12] + "+" * code["changed"]  # a plus: the package's files differ
    path = keep(found, count_tests(tests) if tests else None, commit, records)
    console.print(str(path), soft_wrap=True)


def count_tests(file: Path) -> dict[str, Any]:
    """Numbers of tests by outcome, and how long they took, of JUnit XML."""
    (suite,) = ElementTree.parse(file).getroot().iter("testsuite")
    total, failed, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "skipped"))
    failed += int(suite.attrib["errors"])
    return {
        "passed": total - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(float(suite.attrib["time"])),
        "date": suite.attrib["timestamp"][:10],
    }


def keep(check: dict[str, Any], tests: dict[str, Any] | None, commit: str, records: Path) -> Path:
    """Add a result to the record of its environment.

    Args:
        check: document that `sparsemm check --run --json` wrote.
        tests: counts of `count_tests`; if none, an earlier result of the same versions stays.
        commit: commit of this project that was run.
        records: folder of all records.
    """
    versions = {name: check["versions"][name] for name in PACKAGES}
    minor = ".".join(versions["python"].split(".")[:2])
    device = check["device"].lower().replace(" ", "-")
    path = records / f"vllm-{versions['vllm']}-python-{minor}-{device}.json"
    document: dict[str, Any] = {"versions": versions, "device": check["device"]}
    if path.exists() and (before := json.loads(path.read_text()))["versions"] == versions:
        document = before
    wrong = [row["name"] for row in check["rows"] if row["status"] != "ok"]
    document["check"] = {
        "rows": len(check["rows"]),
        "wrong": wrong,
        "seconds": check["seconds"],
        "date": check["date"],
        "commit": commit,
    }
    if tests is not None:
        document["tests"] = tests | {"commit": commit}
    records.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return path


@app.command()
def table(
    page: Annotated[Path, typer.Option(help="Markdown file with the markers.")] = PAGE,
) -> None:
    """Write the table between its markers."""
    text = with_tables(page.read_text(), {"compatibility": lines}, Path(__file__).name)
    write_whole(page, text)
    console.print(str(page), soft_wrap=True)


def lines(results: Path = RESULTS) -> list[str]:
    """The table, newest vLLM first."""
    rows = sorted(
        [*recorded(results), *on_gpus(results)],
        key=lambda row: (Version(row["vllm"]), row["device"], Version(row["python"] or "0")),
        reverse=True,
    )
    columns = (*PACKAGES, "device", "check --run", "tests", "date")
    heads = ("vLLM", "torch", "triton", "transformers", "Python", "device",
             "`sparsemm check --run`", "tests", "run on")  # fmt: skip
    return markdown(heads, [[row[column] or "-" for column in columns] for row in rows])


def recorded(results: Path) -> Iterator[dict[str, str]]:
    """Rows of what `record` kept."""
    for file in sorted((results / "compatibility").glob("*.json")):
        found = json.loads(file.read_text())
        check, tests = found["check"], found.get("tests")
        passed = f"{check['rows'] - len(check['wrong'])} of {check['rows']} passed"
        row = dict(found["versions"]) | {"device": found["device"], "tests": ""}
        row["check --run"] = f"{passed}, {check['seconds']:.0f} s"
        row["date"] = max(check["date"], tests["date"] if tests else "")
        if tests:
            row["tests"] = (
                f"{tests['passed']:,} passed, {tests['failed']} failed, {tests['skipped']} skipped"
            )
        yield row


def on_gpus(results: Path) -> Iterator[dict[str, str]]:
    """Rows of what `gpu_run.sh` brought back: kernels, and engines against FlashAttention."""
    for file in sorted(results.glob("*/*/kernels.json")):
        kernels = json.loads(file.read_text())
        if kernels["dry_run"]:
            continue
        machines = kernels["machines"]
        text = f"{len(kernels['cases'])} of {kernels['total']} kernel cases right"
        if (modes := file.with_name("modes.json")).exists():
            engines = json.loads(modes.read_text())
            machines = machines + engines["machines"]
            text += f", {len(engines['cases'])} of {engines['total']} engine modes"
        # The kernels ran without vLLM installed; the engines' machine knows its version.
        known = {name: value for machine in machines for name, value in machine.items() if value}
        row = {name: known.get(name, "") for name in (*PACKAGES, "device")}
        yield row | {"check --run": "", "tests": text, "date": file.parent.name}


if __name__ == "__main__":
    app()
