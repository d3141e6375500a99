"""docs/features.md says what the code does: every test is there, and every reason for a refusal."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sparsemm_vllm
from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.engine.cpu.attention import SparseMMBackend
from support.paths import ROOT, TESTS

PACKAGE = Path(sparsemm_vllm.__file__).parent
PAGE = (ROOT / "docs" / "features.md").read_text()
REFUSE = "UnsupportedError("
ERRORS = "UnsupportedError", "ValueError", "VLLMValidationError"
ALSO_REFUSE = "patches.py", "layout.py"


def table(title: str) -> list[list[str]]:
    """Rows of the table under a heading, cell by cell, without headings of columns and parts."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    return [row for row in rows if not row[0].startswith("**")]


def literal(text: Any) -> str:
    """A string of the code as the page has it: dots in place of what is filled in."""
    if isinstance(text, ast.JoinedStr):
        filled = (str(p.value) if isinstance(p, ast.Constant) else "..." for p in text.values)
        return "".join(filled).removeprefix("SPARSEMM: ")
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        return text.value.removeprefix("SPARSEMM: ")
    return ""


def reasons(source: str) -> Iterator[str]:
    """What a module says when it refuses: its lists of checks, and the errors that it raises."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Name("checks")], value=ast.List(checks)):
                yield from (literal(check.elts[1]) for check in checks)  # type: ignore[attr-defined]
            case ast.Assign(targets=[ast.Name("variants")], value=ast.Dict(names)):
                yield from map(literal, names)
            case ast.Raise(exc=ast.Call(ast.Name(error), [text])) if error in ERRORS:
                yield literal(text)


def refusals() -> set[str]:
    """The reasons of every module that refuses configurations."""
    sources = [(file.name, file.read_text()) for file in PACKAGE.rglob("*.py")]
    refusing = [text for name, text in sources if REFUSE in text or name in ALSO_REFUSE]
    return {reason for text in refusing for reason in reasons(text) if reason.strip(".")}


@pytest.mark.parametrize("title", ["Works", "Refused"])
def test_every_row_names_tests_that_exist(title: str) -> None:
    there = {
        name
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    rows = table(title)
    assert len(rows) > 20
    for feature, _, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, f"no test shows {feature}"
        assert set(named) <= there, f"{feature}: {sorted(set(named) - there)}"


def test_every_refusal_is_on_the_page() -> None:
    found = refusals()
    assert len(found) > 25
    page = "\n".join(reason for _, reason, _ in table("Refused"))
    missing = sorted(reason for reason in found if reason not in page)
    assert not missing


def test_every_reason_on_the_page_is_in_the_code() -> None:
    """Ours, or what vLLM says when it asks the backend."""
    asked = textwrap.dedent(inspect.getsource(SparseMMBackend.validate_configuration.__func__))  # type: ignore[attr-defined]
    ours = (PACKAGE / "engine" / "attention" / "cuda.py").read_text()
    strings = {literal(node) for text in (asked, ours) for node in ast.walk(ast.parse(text))}
    quoted = [q for _, reason, _ in table("Refused") for q in re.findall(r'"([^"]+)"', reason)]
    assert sorted(set(quoted) - refusals() - strings) == []


def test_methods_and_caches() -> None:
    works = {feature: tests for feature, _, tests in table("Works")}
    (methods,) = (feature for feature in works if feature.startswith("methods "))
    assert set(re.findall(r"`(\w+)`", methods)) == set(METHODS)
    (caches,) = (feature for feature in works if feature.startswith("KV caches "))
    assert set(re.findall(r"`(\w+)`", caches)) == set(SparseMMBackend.supported_kv_cache_dtypes)
